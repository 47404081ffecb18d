"""MimicDet: a one-stage detector that mimics its own two-stage head (arXiv 2009.11528)."""

from .config import add_mimicdet_config
from .distiller import MimicDetTeacher
from .graph import MimicDetGraph
from .labels import ProposalLabeler
from .mimicdet import MimicDet
from .refinement import RefinementModule, RefinementOutput
from .staggered_fpn import StaggeredFPN, build_mimicdet_resnet_fpn_backbone
from .tap import MimicDetTap

__all__ = [
    "MimicDet",
    "MimicDetGraph",
    "MimicDetTap",
    "MimicDetTeacher",
    "RefinementModule",
    "StaggeredFPN",
    "add_mimicdet_config",
    "build_mimicdet_resnet_fpn_backbone",
]
