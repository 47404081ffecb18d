"""Regions: where a loss applies, and how strongly; one file a kind of knowledge they use."""

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
    assignment_of,
)

__all__ = [
    "All",
    "AnchorRegion",
    "Assigned",
    "CellRegion",
    "Complement",
    "Product",
    "Region",
    "Valid",
    "anchor_levels",
    "assignment_of",
]
