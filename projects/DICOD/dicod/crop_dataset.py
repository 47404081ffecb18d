"""Crops of objects for the training and evaluation of classifiers, in batches.

Crops are stretched to a square as at distillation time: bilinear, not antialiased, with the mean
colour beyond the border of the image (:func:`kd_d2.modeling.layers.box_crop.crop_boxes`). They
leave here as float32 of 0..255, in the student's order of channels; the classifier normalises them.
"""

from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import Dataset

from kd_d2.config import choice
from kd_d2.data import (
    PhotometricDistortion,
    ResumableTrainLoader,
    build_mapper,
    build_train_loader,
)
from kd_d2.modeling.layers.box_crop import crop_boxes

from .crop_distortion import build_crop_distortion
from .crop_files import check_crop_files, patch_bounds, patch_file
from .crop_index import CropIndex, load_crop_indices
from .record_loaders import (
    build_record_test_loader,
    build_record_train_loader,
    crops_per_process,
)

__all__ = [
    "CropMapper",
    "CropRecords",
    "OnlineCropLoader",
    "OnlineCropMapper",
    "build_crop_test_loader",
    "build_crop_train_loader",
    "crop_raw",
    "num_training_crops",
]

Batch = Dict[str, Tensor]


def crop_raw(image: Tensor, boxes: Tensor, size: int, fill: Tensor) -> Tensor:
    """Return crops of an image that is not normalised.

    Args:
        image: (C, H, W).
        boxes: (n, 4), XYXY in pixels of the image.
        size: side of the crops.
        fill: (C,), colour beyond the border: the mean that normalisation subtracts.

    Returns:
        (n, C, size, size) float32.
    """
    fill = fill.view(-1, 1, 1)
    centred = (image.float() - fill)[None]
    return crop_boxes(centred, [boxes.float()], size, [tuple(image.shape[-2:])]) + fill


class CropRecords(Dataset):
    """The entries of several indices in a row, as the dicts that :class:`CropMapper` takes.

    Args:
        indices: with equal classes.
        crops_dir: folder of image files of all crops; empty: crops are cut from the images.

    Raises:
        ValueError: ``crops_dir`` lacks the crops of an index.
    """

    def __init__(self, indices: Sequence[CropIndex], crops_dir: str = ""):
        self.indices = list(indices)
        self.crops_dir = crops_dir
        for index in self.indices if crops_dir else ():
            check_crop_files(index, crops_dir)
        self._ends = np.cumsum([len(index) for index in self.indices])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Dict[str, Any]:
        which = int(np.searchsorted(self._ends, i, side="right"))
        index = self.indices[which]
        i = int(i - self._ends[which] + len(index))
        record = index.record(i)
        if self.crops_dir:
            record["patch_file"] = patch_file(self.crops_dir, index.name, i)
        return record


class CropMapper:
    """Maps an entry of an index to its crop, as the mode "object" does.

    Returns a dict with "crop", (3, size, size) float32 of 0..255, and "label".
    """

    def __init__(
        self,
        *,
        size: int,
        image_format: str,
        fill: Sequence[float],
        augmentations: Sequence[T.Augmentation] = (),
        distortion: Optional[Callable[[Tensor], Tensor]] = None,
    ):
        """
        Args:
            size: side of the crop.
            image_format: "RGB" or "BGR".
            fill: colour beyond the border of the image, in that order.
            augmentations: applied to the stretched crop.
            distortion: applied to the stretched crop before them.
        """
        self.size = size
        self.image_format = image_format
        self.fill = torch.tensor(fill, dtype=torch.float32)
        self.augmentations = T.AugmentationList(augmentations)
        self.distortion = distortion

    def __call__(self, record: Dict[str, Any]) -> Dict[str, Any]:
        width, height = record["width"], record["height"]
        x0, y0, x1, y1 = patch_bounds(record["box"], width, height)
        if "patch_file" in record:
            patch = utils.read_image(record["patch_file"], format=self.image_format)
            if patch.shape[:2] != (y1 - y0, x1 - x0):
                raise ValueError(f"{record['patch_file']} has the size {patch.shape[:2]}")
        else:
            image = utils.read_image(record["file_name"], format=self.image_format)
            utils.check_image_size(dict(record), image)
            patch = image[y0:y1, x0:x1]
        box = np.clip(record["box"], 0, [width, height, width, height]) - [x0, y0, x0, y0]
        pixels = torch.as_tensor(np.ascontiguousarray(patch.transpose(2, 0, 1)))
        crop = crop_raw(pixels, torch.as_tensor(box)[None], self.size, self.fill)[0]
        if self.distortion is not None:
            crop = self.distortion(crop)
        inputs = T.AugInput(np.ascontiguousarray(crop.numpy().transpose(1, 2, 0)))
        self.augmentations(inputs)
        crop = np.ascontiguousarray(inputs.image.transpose(2, 0, 1), dtype=np.float32)
        return {"crop": torch.as_tensor(crop), "label": record["label"]}


class OnlineCropMapper:
    """Runs a detection mapper and crops all boxes that survived it.

    The crops are those that the student's distillation would show the classifier: truncated,
    rescaled and distorted as the student's images are.

    Returns a dict with "crops" (n, 3, size, size) float32, "labels" (n,), "width" and "height".
    """

    def __init__(self, mapper: Callable[[Dict[str, Any]], Any], *, size: int, fill):
        """
        Args:
            mapper: the student's, for training.
            size: side of the crops.
            fill: colour beyond the border, in the order of the mapped image's channels.
        """
        self.mapper = mapper
        self.size = size
        self.fill = torch.tensor(fill, dtype=torch.float32)

    def __call__(self, record: Dict[str, Any]) -> Any:
        mapped = self.mapper(record)
        if mapped is None:
            return None
        image, instances = mapped["image"], mapped["instances"]
        return {
            "crops": crop_raw(image, instances.gt_boxes.tensor, self.size, self.fill),
            "labels": instances.gt_classes,
            "width": image.shape[-1],
            "height": image.shape[-2],
        }


class OnlineCropLoader:
    """Batches of the crops of many images: an endless loader over a loader of cropped images.

    Crops wait in a buffer, from which each batch is drawn at random, so that a batch is not made
    of a few images. At a checkpoint the running and the resuming process both begin with an empty
    buffer at the same image (see :class:`kd_d2.data.ResumableTrainLoader`): what waited is lost,
    and images may be seen a little earlier or later than without the checkpoint.

    Args:
        images: loader of lists of :class:`OnlineCropMapper`'s results, one list per batch of
            crops on average.
        batch_size: crops per batch of this process.
        buffer_size: crops that wait; at least one batch does.
    """

    def __init__(self, images: ResumableTrainLoader, *, batch_size: int, buffer_size: int):
        self.images = images
        self.batch_size = batch_size
        self.buffer_size = max(buffer_size, batch_size)

    def __iter__(self) -> Iterator[Batch]:
        crops: List[Tensor] = []
        labels: List[Tensor] = []
        for mapped in self.images:
            for image in mapped:
                # copies, or a waiting crop would keep those of its whole image
                crops += [crop.clone() for crop in image["crops"]]
                labels += list(image["labels"])
            while len(crops) >= self.buffer_size:
                chosen = [self._drawn(crops, labels) for _ in range(self.batch_size)]
                batch, targets = zip(*chosen)
                yield {"crops": torch.stack(batch), "labels": torch.stack(targets)}

    @staticmethod
    def _drawn(crops: List[Tensor], labels: List[Tensor]):
        i = np.random.randint(len(crops))
        for waiting in (crops, labels):
            waiting[i], waiting[-1] = waiting[-1], waiting[i]
        return crops.pop(), labels.pop()

    def rewind(self, batches_consumed: int) -> None:
        """See :meth:`ResumableTrainLoader.rewind`."""
        self.images.rewind(batches_consumed)

    def state_dict(self) -> Dict[str, int]:
        return self.images.state_dict()

    def load_state_dict(self, state: Dict[str, int]) -> None:
        self.images.load_state_dict(state)


def build_crop_train_loader(cfg):
    """Return the endless loader of training batches that ``cfg`` describes.

    A batch is a dict with "crops" (B, 3, S, S) float32 of 0..255 and "labels" (B,) int64, where B
    is this process' share of CROP_CLASSIFIER.BATCH_SIZE. The same seeds give the same batches.

    Raises:
        ValueError: unknown mode, unequal classes, no crops, or a batch that cannot be shared.
        FileNotFoundError: a data set is not there.
    """
    return _MODES[choice("CROP_CLASSIFIER.MODE", cfg.CROP_CLASSIFIER.MODE, _MODES)](cfg)


def build_crop_test_loader(cfg, name: str):
    """Return the loader of all crops of data set ``name``, each once, without augmentation.

    With several processes each has its part. An image that cannot be read raises, naming it.
    """
    node = cfg.CROP_CLASSIFIER
    records = CropRecords(load_crop_indices([name], node.INDEX_DIR), node.CROPS_DIR)
    return build_record_test_loader(cfg, records, _object_mapper(cfg, is_train=False))


def num_training_crops(cfg) -> int:
    """Number of crops of DATASETS.TRAIN."""
    return sum(map(len, load_crop_indices(cfg.DATASETS.TRAIN, cfg.CROP_CLASSIFIER.INDEX_DIR)))


def _object_loader(cfg) -> ResumableTrainLoader:
    node = cfg.CROP_CLASSIFIER
    records = CropRecords(load_crop_indices(cfg.DATASETS.TRAIN, node.INDEX_DIR), node.CROPS_DIR)
    return build_record_train_loader(cfg, records, _object_mapper(cfg, is_train=True))


def _online_loader(cfg) -> OnlineCropLoader:
    node = cfg.CROP_CLASSIFIER
    batch = crops_per_process(cfg)
    indices = load_crop_indices(cfg.DATASETS.TRAIN, node.INDEX_DIR)
    # images with crops are those that training uses; on average their crops fill one batch
    images = sum(len(np.unique(index.image_index)) for index in indices)
    images_per_batch = max(1, round(batch * images / sum(map(len, indices))))
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = images_per_batch * comm.get_world_size()
    mapper = OnlineCropMapper(
        build_mapper(cfg, True), size=node.INPUT_SIZE, fill=cfg.MODEL.PIXEL_MEAN
    )
    return OnlineCropLoader(
        build_train_loader(cfg, mapper), batch_size=batch, buffer_size=node.SHUFFLE_BUFFER
    )


_MODES = {"object": _object_loader, "online": _online_loader}


def _object_mapper(cfg, is_train: bool) -> CropMapper:
    return CropMapper(
        size=cfg.CROP_CLASSIFIER.INPUT_SIZE,
        image_format=cfg.INPUT.FORMAT,
        fill=cfg.MODEL.PIXEL_MEAN,
        augmentations=_augmentations(cfg) if is_train else (),
        distortion=build_crop_distortion(cfg) if is_train else None,
    )


def _augmentations(cfg) -> List[T.Augmentation]:
    flip = cfg.INPUT.RANDOM_FLIP
    result: List[T.Augmentation] = []
    if cfg.CROP_CLASSIFIER.PHOTOMETRIC:
        result.append(PhotometricDistortion(cfg.INPUT.FORMAT))
    if flip != "none":
        result.append(T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"))
    return result
