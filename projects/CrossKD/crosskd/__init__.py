"""CrossKD: cross-head knowledge distillation for dense detectors (arXiv 2306.11369)."""

from .config import add_crosskd_config
from .distiller import CrossKD

__all__ = ["CrossKD", "add_crosskd_config"]
