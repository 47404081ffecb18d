"""Detectors, in Detectron2's META_ARCH_REGISTRY once this package is imported."""

from .atss import ATSS
from .dense_head import DenseHead
from .fcos import FCOS
from .gfl import GFL

__all__ = ["ATSS", "FCOS", "GFL", "DenseHead"]
