"""Detectors, in Detectron2's META_ARCH_REGISTRY once this package is imported."""

from .atss import ATSS
from .dense_head import DenseHead
from .fcos import FCOS
from .gfl import GFL
from .ssd import SSD
from .ssd_head import SSDHead

__all__ = ["ATSS", "FCOS", "GFL", "SSD", "DenseHead", "SSDHead"]
