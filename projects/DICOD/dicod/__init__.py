"""DICOD: image classifiers as teachers of detectors (arXiv 2106.05209)."""

from .classifier import CropClassifier
from .classifier_config import add_classifier_config
from .config import add_dicod_config
from .crop_index import CropIndex, build_crop_index, load_crop_index
from .distiller import DICOD
from .teacher import ClassifierTeacher, load_classifier

__all__ = [
    "DICOD",
    "ClassifierTeacher",
    "CropClassifier",
    "CropIndex",
    "add_classifier_config",
    "add_dicod_config",
    "build_crop_index",
    "load_classifier",
    "load_crop_index",
]
