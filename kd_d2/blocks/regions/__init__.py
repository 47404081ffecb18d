"""Regions: where a loss applies, and how strongly; one file a kind of knowledge they use."""

from .anchors import NearAnchor
from .base import (
    All,
    AnchorRegion,
    Assigned,
    CellRegion,
    Complement,
    Product,
    Region,
    Valid,
    anchor_levels,
    anchor_strides,
    assignment_of,
    at_strides,
)
from .general_instances import GISelect
from .gt import BoxRegion, Gaussian, GTCells, GTCentre, ScaledBackground, ScaledGT, fpn_level
from .matched import Matched
from .predictions import PredDiff, TeacherConf
from .student_score import StudentScore
from .vlr import VLR

__all__ = [
    "All",
    "AnchorRegion",
    "Assigned",
    "BoxRegion",
    "CellRegion",
    "Complement",
    "GISelect",
    "GTCells",
    "GTCentre",
    "Matched",
    "Gaussian",
    "NearAnchor",
    "PredDiff",
    "Product",
    "Region",
    "ScaledBackground",
    "ScaledGT",
    "StudentScore",
    "TeacherConf",
    "VLR",
    "Valid",
    "anchor_levels",
    "anchor_strides",
    "assignment_of",
    "at_strides",
    "fpn_level",
]
