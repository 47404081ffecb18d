"""Detectors, in Detectron2's META_ARCH_REGISTRY once this package is imported."""

from .dense_head import DenseHead
from .gfl import GFL

__all__ = ["GFL", "DenseHead"]
