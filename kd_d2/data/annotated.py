"""Test images with their ground truth, as the network sees them."""

from typing import List

from detectron2.data import (
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import build_augmentation

from .loader import evenly_spaced
from .mappers import NamingMapper

__all__ = ["annotated_images", "choose_indices"]


def choose_indices(size: int, listed: str, count: int) -> List[int]:
    """Indices of images of a data set with ``size`` images.

    Args:
        size: number of images.
        listed: indices separated by commas, e.g. "3,17"; empty: see ``count``.
        count: that many evenly spaced ones; all if there are no more.

    Raises:
        ValueError: an entry that is no index of the data set, or a count below 1.
    """
    if not listed:
        if count < 1:
            raise ValueError(f"--num-images must be at least 1, got {count}")
        return evenly_spaced(size, count)
    parts = [part.strip() for part in listed.split(",")]
    wrong = [part for part in parts if not part.isdecimal() or int(part) >= size]
    if wrong:
        raise ValueError(
            f"--images takes indices 0..{size - 1} separated by commas, got '{wrong[0]}'"
        )
    return [int(part) for part in parts]


def annotated_images(cfg, dataset: str, listed: str = "", count: int = 1) -> MapDataset:
    """Detectron2's inputs, resized as for a test, but with ``instances``: the training targets.

    As in training, crowd boxes are left out. Every record also has its ``index``. Images are read
    when they are asked for.

    Args:
        cfg: whole config; its INPUT decides size and channel order.
        dataset: registered name.
        listed, count: see :func:`choose_indices`.

    Raises:
        ValueError: see :func:`choose_indices`; or, later, an image cannot be read.
    """
    records = get_detection_dataset_dicts([dataset], filter_empty=False)
    mapper = DatasetMapper(
        is_train=True,  # with annotations
        augmentations=build_augmentation(cfg, is_train=False),
        image_format=cfg.INPUT.FORMAT,
    )
    indices = choose_indices(len(records), listed, count)
    chosen = [{**records[index], "index": index} for index in indices]
    return MapDataset(DatasetFromList(chosen, copy=False), NamingMapper(mapper))
