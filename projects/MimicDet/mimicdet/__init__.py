"""MimicDet: a one-stage detector that mimics its own two-stage head (arXiv 2009.11528)."""

from .config import add_mimicdet_config
from .staggered_fpn import StaggeredFPN, build_mimicdet_resnet_fpn_backbone

__all__ = ["StaggeredFPN", "add_mimicdet_config", "build_mimicdet_resnet_fpn_backbone"]
