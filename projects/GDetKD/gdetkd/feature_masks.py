"""Feature terms that compare whole maps under a mask: the baselines of Table 6."""

import math

import torch
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage

from kd_d2.blocks import (
    All,
    BoxRegion,
    Const,
    ConvAdapter,
    NearAnchor,
    PairTerm,
    Region,
    TrunkSource,
    fpn_level,
)
from kd_d2.config import choice

from .feature_terms import FEATURE_TERMS, FeatureTerm, Keys

__all__ = [
    "AnchorMaskTerm",
    "CentreCells",
    "CentreGaussian",
    "GTMaskTerm",
    "GaussianMaskTerm",
    "MaskTerm",
    "WholeTerm",
]

# of FGFI's official adapter
_STD = 1e-4
# P2-P6, the levels that a box of any size is on
_FINEST_STRIDE, _NUM_LEVELS = 4, 5


class CentreCells(BoxRegion):
    """1 on the cells whose centre a ground-truth box covers, its right and lower edge excluded.

    A box without a centre has the cell of its own centre, on the map's border if it lies outside:
    no box vanishes on a coarse level. With ``levels`` "fpn" a box counts on the level of its size
    on P2-P6 (:func:`fpn_level`), or on the nearest one that is compared.
    """

    def own_level(self, boxes, grids):
        finest = round(math.log2(grids[0].stride / _FINEST_STRIDE))
        return (fpn_level(boxes, _NUM_LEVELS) - finest).clamp(0, len(grids) - 1)

    def sides(self, boxes, grid, image_size):
        low, high = boxes[:, None, :2], boxes[:, None, 2:]
        sizes = ((grid.width, 0), (grid.height, 1))
        centres = [
            (torch.arange(length, device=boxes.device) + 0.5) * grid.stride for length, _ in sizes
        ]
        inside = [(x >= low[..., i]) & (x < high[..., i]) for i, x in enumerate(centres)]
        vanished = ~(inside[0].any(dim=1) & inside[1].any(dim=1))[:, None]
        weights = []
        for (length, i), x, within in zip(sizes, centres, inside):
            middle, half = (low[..., i] + high[..., i]) / 2, (high[..., i] - low[..., i]) / 2
            own = (middle / grid.stride).floor().clamp(0, length - 1)
            alone = torch.arange(length, device=boxes.device) == own
            profile = self.profile((x - middle) / half) * within
            weights.append(torch.where(vanished, alone.float(), profile))
        return weights[1], weights[0]

    def profile(self, offset: torch.Tensor) -> torch.Tensor:
        """Weight along one axis at ``offset`` from the middle, in halves of the box's side."""
        return torch.ones_like(offset)


class CentreGaussian(CentreCells):
    """exp(-dx^2/2 - dy^2/2) on these cells, with dx, dy the distances of their centres from the
    box's centre in halves of its sides: 1 in the middle, 0.3679 at a corner. The cell of a box
    without a centre has 1."""

    def profile(self, offset):
        return torch.exp(-offset.square() / 2)


class MaskTerm(FeatureTerm):
    """1 / (2 N_p) sum over images, levels, cells and channels of I (f_adapt(S) - T)^2.

    I is the mask, N_p the number of cells of all images and levels where it is not 0. Levels are
    paired by stride: P2-P6 of two-stage students, of dense ones P3-P6. Logs
    ``gdetkd/<mode>_cells``, which is N_p.
    """

    name = ""
    default_weight = 0.01
    uses_rois = False
    # whether the paper has a number for dense students
    dense = False

    @configurable
    def __init__(
        self,
        *,
        student_keys: Keys,
        teacher_keys: Keys,
        level_assign: str = "all",
        adapt_relu: bool = False,
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            level_assign: "all" or "fpn", KD.GDETKD.FEAT.LEVEL_ASSIGN.
            adapt_relu: a ReLU behind the 3x3 convolution of each level, whose weights then begin
                as in FGFI's official code.

        Raises:
            ValueError: an unknown value, a dense student where that is not defined, or networks
                without a common level.
        """
        super().__init__()
        choice("KD.GDETKD.FEAT.LEVEL_ASSIGN", level_assign, ("all", "fpn"))
        if not self.dense and "proposals" not in student_keys:
            raise ValueError(
                f"KD.GDETKD.FEAT.MODE '{self.name}' is for two-stage students, and this one is "
                "dense; use 'gt_mask', 'roifi' or 'sgfi'"
            )
        self.source = TrunkSource("neck")
        self.region = self.make_region(level_assign)
        self.compared = PairTerm(
            self.source,
            region=self.region,
            adapter=ConvAdapter(3, relu=adapt_relu, std=_STD if adapt_relu else None),
            normaliser=Const(2.0),
        )
        self.compared.bind(student_keys, teacher_keys)
        blocks = self.compared.blocks
        self.student_needs = tuple(sorted({k for b in blocks for k in b.student_needs}))
        self.teacher_needs = tuple(sorted({k for b in blocks for k in b.teacher_needs}))

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node = cfg.KD.GDETKD.FEAT
        return {
            "student_keys": student_keys,
            "teacher_keys": teacher_keys,
            "level_assign": node.LEVEL_ASSIGN,
            "adapt_relu": node.ADAPT_RELU,
        }

    def make_region(self, level_assign: str) -> Region:
        """Return the mask."""
        raise NotImplementedError

    def forward(self, ctx, rois):
        half = self.compared(ctx)
        with torch.no_grad():
            cells = sum((self.region(ctx, pair) > 0).sum() for pair in self.source(ctx))
        get_event_storage().put_scalar(f"gdetkd/{self.name}_cells", cells)
        return half / cells.clamp(min=1)


class WholeTerm(MaskTerm):
    """Every cell, padding included."""

    name = "whole"

    def make_region(self, level_assign):
        return All()


class AnchorMaskTerm(MaskTerm):
    """Cells with an anchor of the RPN whose IoU with a box exceeds half of the largest one on the
    level (FGFI). "fpn": a box marks cells only on the level of its size."""

    name = "anchor_mask"

    def make_region(self, level_assign):
        return NearAnchor(0.5, scope={"all": "each", "fpn": "own"}[level_assign])


class GaussianMaskTerm(MaskTerm):
    """A bell in every box; where boxes overlap the largest counts (TADF)."""

    name = "gaussian_mask"

    def make_region(self, level_assign):
        return CentreGaussian(level_assign)


class GTMaskTerm(MaskTerm):
    """Cells inside of a box."""

    name = "gt_mask"
    dense = True

    def make_region(self, level_assign):
        return CentreCells(level_assign)


for _term in (WholeTerm, AnchorMaskTerm, GaussianMaskTerm, GTMaskTerm):
    FEATURE_TERMS._do_register(_term.name, _term)
