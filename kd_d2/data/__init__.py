"""Data sets and robust, exactly resumable training input."""

from .annotated import annotated_images, choose_indices
from .checks import check_datasets, dataset_classes, drop_unusable_annotations
from .datasets import dataset_root, register_all
from .digit_scenes import build_digit_scenes, digit_scenes_paths
from .loader import ResumableTrainLoader, build_sample_loader, build_test_loader, build_train_loader
from .mappers import NamingMapper, RobustDataset
from .scenes import DigitScenesParams

__all__ = [
    "DigitScenesParams",
    "NamingMapper",
    "ResumableTrainLoader",
    "RobustDataset",
    "annotated_images",
    "build_digit_scenes",
    "build_sample_loader",
    "build_test_loader",
    "build_train_loader",
    "check_datasets",
    "choose_indices",
    "dataset_classes",
    "dataset_root",
    "digit_scenes_paths",
    "drop_unusable_annotations",
    "register_all",
]
