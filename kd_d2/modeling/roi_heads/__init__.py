"""RoI heads, in Detectron2's ROI_HEADS_REGISTRY once this package is imported."""

from .res5 import KDRes5ROIHeads

__all__ = ["KDRes5ROIHeads"]
