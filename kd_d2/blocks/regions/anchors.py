"""Regions of the anchors that are near ground-truth boxes."""

from typing import List, Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou

from ..pair import Grid
from ..registry import KD_REGIONS
from .base import CellRegion, anchor_strides, at_strides, strides_of_anchors
from .gt import fpn_level

__all__ = ["NearAnchor"]


@KD_REGIONS.register()
class NearAnchor(CellRegion):
    """1 on the cells with an anchor whose IoU with a ground-truth box exceeds a fraction of the
    largest IoU of that box.

    The mask of FGFI (Wang et al., Distilling Object Detectors with Fine-grained Feature
    Imitation, CVPR 2019); all of the student's anchors count, unclipped, also those that cross the
    border of the image. A box that no anchor overlaps marks nothing.
    """

    student_needs = ("anchors",)

    def __init__(self, threshold: float = 0.5, scope: str = "all"):
        """
        Args:
            threshold: the fraction, in [0, 1).
            scope: where the largest IoU of a box is looked for. "all": on all levels of the
                student (LD's official code). "own": on the one of the compared levels that
                :func:`fpn_level` gives the box, which marks nothing on others (DeFeat's). "each":
                on every level by itself. "map": the same for a single map (FGFI's).

        Raises:
            ValueError: one of them is not as above.
        """
        if not 0 <= threshold < 1:
            raise ValueError(f"NearAnchor: threshold must lie in [0, 1), got {threshold}")
        if scope not in ("all", "own", "each", "map"):
            raise ValueError(
                f'NearAnchor: scope must be "all", "own", "each" or "map", got {scope!r}'
            )
        self._threshold, self._scope = threshold, scope

    def bind(self, student_keys, teacher_keys):
        self.strides = strides_of_anchors(self, student_keys)

    def cells(self, ctx, grids):
        if self._scope == "map" and len(grids) > 1:
            raise ValueError(
                f'NearAnchor(scope="map") is for one map, but {len(grids)} levels are compared; '
                'choose one with levels= of the source, or scope="each"'
            )
        images = [self._image(ctx, gt.gt_boxes, grids) for gt in ctx.gt_instances]
        levels = [torch.stack(level) for level in zip(*images)]
        return [
            near.view(len(near), grid.height, grid.width, -1).amax(dim=-1)
            for near, grid in zip(levels, grids)
        ]

    def _image(self, ctx, gt: Boxes, grids: Sequence[Grid]) -> List[torch.Tensor]:
        """Return 0 or 1 for the anchors of every compared level."""
        every = [pairwise_iou(gt, boxes) for boxes in ctx.student["anchors"]]  # (G, R) each
        ious = at_strides("anchors of the student", anchor_strides(ctx), every, grids)
        if not len(gt):
            return [iou.new_zeros(iou.shape[1]) for iou in ious]
        largest = [iou.amax(dim=1) for iou in (every if self._scope == "all" else ious)]
        if self._scope == "all":
            largest = [torch.stack(largest).amax(dim=0)] * len(ious)
        elif self._scope == "own":
            own = fpn_level(gt.tensor, len(ious))
            largest = [torch.where(own == i, x, float("inf")) for i, x in enumerate(largest)]
        bounds = [self._threshold * x[:, None] for x in largest]
        return [(iou > bound).any(dim=0).float() for iou, bound in zip(ious, bounds)]
