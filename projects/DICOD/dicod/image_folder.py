"""Images in a folder for each class, ImageNet's layout, as training data of a classifier."""

import functools
import math
import os
from typing import Any, Dict, List

import torch
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from kd_d2.data import dataset_root

__all__ = ["FolderMapper", "FolderRecords", "folder_classes", "num_folder_images", "open_folder"]


def open_folder(cfg, split: str) -> ImageFolder:
    """Return the listing of the images of CROP_CLASSIFIER.FOLDER.TRAIN or TEST.

    A relative path is below the folder of the data sets. Files are listed once in a process.

    Args:
        cfg: whole config.
        split: "TRAIN" or "TEST".

    Raises:
        ValueError: no folder is given, or there are no images in it.
        FileNotFoundError: it does not exist.
    """
    path = cfg.CROP_CLASSIFIER.FOLDER[split]
    key = f"CROP_CLASSIFIER.FOLDER.{split}"
    if not path:
        raise ValueError(
            f"{key} is empty; CROP_CLASSIFIER.MODE 'folder' needs a folder that has a folder of "
            "images for each class"
        )
    path = os.path.abspath(os.path.join(dataset_root(), os.path.expanduser(path)))
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"{key} was looked for in {path}, which does not exist; it must have a folder of "
            "images for each class. The environment variable DETECTRON2_DATASETS is the folder "
            "that relative paths begin at."
        )
    try:
        return _listing(path)
    except FileNotFoundError as error:
        raise ValueError(f"{key} is {path}: {error}") from error


@functools.lru_cache(maxsize=None)
def _listing(path: str) -> ImageFolder:
    return ImageFolder(path)


def folder_classes(cfg, split: str) -> List[str]:
    """The names of the folders, sorted: the classes in the order of the logits."""
    return list(open_folder(cfg, split).classes)


def num_folder_images(cfg) -> int:
    """Number of training images."""
    return len(open_folder(cfg, "TRAIN"))


class FolderRecords(Dataset):
    """The images of a folder as dicts with "file_name" and "label"."""

    def __init__(self, folder: ImageFolder):
        self.samples = folder.samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Dict[str, Any]:
        path, label = self.samples[i]
        return {"file_name": path, "label": label}


class FolderMapper:
    """Maps a record to "crop", (3, size, size) float32 of 0..255, and "label".

    Training (Szegedy et al., CVPR 2015, as everywhere since): a random part of 8 to 100 % of the
    image and of an aspect ratio of 3/4 to 4/3, resized, flipped as ``flip`` says. Evaluation: the
    middle square of the image whose shorter side is 256/224 of ``size``.

    Args:
        size: side of the result, pixels.
        image_format: "RGB" or "BGR".
        is_train: which of both.
        flip: "horizontal", "vertical" or "none".
    """

    def __init__(self, *, size: int, image_format: str, is_train: bool, flip: str = "none"):
        if is_train:
            flips = {
                "none": [],
                "horizontal": [transforms.RandomHorizontalFlip()],
                "vertical": [transforms.RandomVerticalFlip()],
            }
            steps = [transforms.RandomResizedCrop(size), *flips[flip]]
        else:
            # rounded up, so that the square fits
            steps = [transforms.Resize(math.ceil(size * 256 / 224)), transforms.CenterCrop(size)]
        self.transform = transforms.Compose([*steps, transforms.PILToTensor()])
        self.image_format = image_format

    def __call__(self, record: Dict[str, Any]) -> Dict[str, Any]:
        pixels = self.transform(default_loader(record["file_name"])).to(torch.float32)
        crop = pixels.flip(0) if self.image_format == "BGR" else pixels
        return {"crop": crop, "label": record["label"]}
