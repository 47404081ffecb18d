"""Types of detection errors and what each costs (TIDE), for predictions in COCO's format."""

from .analysis import BACKGROUND_IOU, COCO_THRESHOLDS, TideResult, check_thresholds, tide_errors
from .errors import ERROR_TYPES
from .evaluator import TideEvaluator

__all__ = [
    "BACKGROUND_IOU",
    "COCO_THRESHOLDS",
    "ERROR_TYPES",
    "TideEvaluator",
    "TideResult",
    "check_thresholds",
    "tide_errors",
]
