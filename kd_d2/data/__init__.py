"""Data sets and robust, exactly resumable training input."""

from .annotated import annotated_images, choose_indices
from .checks import check_datasets, dataset_classes, drop_unusable_annotations
from .datasets import dataset_root, register_all
from .digit_scenes import build_digit_scenes, digit_scenes_paths
from .loader import ResumableTrainLoader, build_sample_loader, build_test_loader, build_train_loader
from .mappers import MAPPER_REGISTRY, NamingMapper, RobustDataset, build_mapper
from .photometric import PhotometricDistortion
from .random_resolution import RandomResolutionMapper, at_resolution
from .scenes import DigitScenesParams
from .ssd_augmentation import Expand, MinIoUCrop
from .ssd_mapper import SSDMapper

__all__ = [
    "DigitScenesParams",
    "Expand",
    "MAPPER_REGISTRY",
    "MinIoUCrop",
    "NamingMapper",
    "PhotometricDistortion",
    "RandomResolutionMapper",
    "ResumableTrainLoader",
    "RobustDataset",
    "SSDMapper",
    "annotated_images",
    "at_resolution",
    "build_digit_scenes",
    "build_mapper",
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
