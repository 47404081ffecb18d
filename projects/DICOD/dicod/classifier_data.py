"""Where the images that a classifier is trained on come from: CROP_CLASSIFIER.MODE."""

from dataclasses import dataclass
from typing import Any, Callable, List, Sequence

from kd_d2.config import choice
from kd_d2.data import dataset_classes

from .crop_dataset import build_crop_test_loader, build_crop_train_loader, num_training_crops
from .image_folder import (
    FolderMapper,
    FolderRecords,
    folder_classes,
    num_folder_images,
    open_folder,
)
from .record_loaders import build_record_test_loader, build_record_train_loader

__all__ = ["ClassifierData", "classifier_data"]


@dataclass(frozen=True)
class ClassifierData:
    """Functions of a whole config; loaders are those of :mod:`.crop_dataset`.

    Attributes:
        classes: class names of the training data.
        num_images: number of the training images of an epoch.
        train_loader: endless loader of training batches.
        test_names: names of the data sets that are evaluated on.
        test_classes: class names of one of them.
        test_loader: loader of all of its images, each once.
    """

    classes: Callable[[Any], List[str]]
    num_images: Callable[[Any], int]
    train_loader: Callable[[Any], Any]
    test_names: Callable[[Any], Sequence[str]]
    test_classes: Callable[[Any, str], List[str]]
    test_loader: Callable[[Any, str], Any]


def _crop_classes(cfg) -> List[str]:
    if not cfg.DATASETS.TRAIN:
        raise ValueError(
            "DATASETS.TRAIN is empty; name the data set whose boxes become crops, or set "
            "CROP_CLASSIFIER.MODE 'folder' for images in a folder for each class"
        )
    return dataset_classes(cfg.DATASETS.TRAIN[0])


def _folder_loader(cfg):
    node = cfg.CROP_CLASSIFIER
    mapper = FolderMapper(
        size=node.INPUT_SIZE,
        image_format=cfg.INPUT.FORMAT,
        is_train=True,
        flip=cfg.INPUT.RANDOM_FLIP,
    )
    return build_record_train_loader(cfg, FolderRecords(open_folder(cfg, "TRAIN")), mapper)


def _folder_test_loader(cfg, name: str):
    mapper = FolderMapper(
        size=cfg.CROP_CLASSIFIER.INPUT_SIZE, image_format=cfg.INPUT.FORMAT, is_train=False
    )
    return build_record_test_loader(cfg, FolderRecords(open_folder(cfg, "TEST")), mapper)


_CROPS = ClassifierData(
    classes=_crop_classes,
    num_images=num_training_crops,
    train_loader=build_crop_train_loader,
    test_names=lambda cfg: cfg.DATASETS.TEST,
    test_classes=lambda cfg, name: dataset_classes(name),
    test_loader=build_crop_test_loader,
)
_FOLDER = ClassifierData(
    classes=lambda cfg: folder_classes(cfg, "TRAIN"),
    num_images=num_folder_images,
    train_loader=_folder_loader,
    test_names=lambda cfg: [x for x in (cfg.CROP_CLASSIFIER.FOLDER.TEST,) if x],
    test_classes=lambda cfg, name: folder_classes(cfg, "TEST"),
    test_loader=_folder_test_loader,
)
_MODES = {"object": _CROPS, "online": _CROPS, "folder": _FOLDER}


def classifier_data(cfg) -> ClassifierData:
    """Return the data that CROP_CLASSIFIER.MODE names.

    Raises:
        ValueError: an unknown mode.
    """
    return _MODES[choice("CROP_CLASSIFIER.MODE", cfg.CROP_CLASSIFIER.MODE, _MODES)]
