"""Data sets and robust, exactly resumable training input."""

from .checks import check_datasets, dataset_classes, drop_unusable_annotations
from .datasets import dataset_root, register_all
from .digit_scenes import DigitScenesParams, build_digit_scenes, digit_scenes_paths

__all__ = [
    "DigitScenesParams",
    "build_digit_scenes",
    "check_datasets",
    "dataset_classes",
    "dataset_root",
    "digit_scenes_paths",
    "drop_unusable_annotations",
    "register_all",
]
