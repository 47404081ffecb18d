"""G-DetKD: a general distillation framework for detectors (arXiv 2108.07482)."""

from . import dense_rois, feature_masks, hetero_prediction  # noqa: F401  (they register themselves)
from .config import add_gdetkd_config
from .distiller import GDetKD

__all__ = ["GDetKD", "add_gdetkd_config"]
