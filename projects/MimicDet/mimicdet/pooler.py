"""RoI pooling from a given pyramid level."""

from typing import Callable, Dict, List

import torch
from detectron2.modeling.poolers import (
    ROIPooler,
    assign_boxes_to_levels,
    convert_boxes_to_pooler_format,
)
from detectron2.structures import Instances
from torch import Tensor

from kd_d2.losses.precision import full_precision

from .options import choice

__all__ = ["LevelROIPooler"]


class LevelROIPooler(ROIPooler):
    """Pools boxes from the level where they were born, or from that of their area.

    "Born" is the index i of the anchor's level in the S-head's list of levels; the box is pooled
    from entry i of the T-head's list, P_(l-1) for an anchor of P_l with the staggered pyramid.
    Pooling is in fp32: half precision would round the boxes' coordinates.
    """

    def __init__(self, *args, level_assign: str = "origin", **kwargs):
        """
        Args:
            level_assign: "origin" (field ``level`` of the boxes; ours, read from the text of
                Sec. 3.3) or "area" (Detectron2's rule, 224 pixels at P4).
            args, kwargs: of ``ROIPooler``.

        Raises:
            ValueError: ``level_assign`` is neither.
        """
        super().__init__(*args, **kwargs)
        self._levels = choice("T_HEAD.LEVEL_ASSIGN", level_assign, _LEVELS)

    def levels(self, proposals: List[Instances]) -> Tensor:
        """Index of the feature map of each box, (R,) int64."""
        return self._levels(self, proposals)

    def forward(self, features: List[Tensor], proposals: List[Instances]) -> Tensor:
        """Return (R, C, P, P), P the pooler's resolution, in the order of the boxes.

        Args:
            features: (N, C, H, W) per level.
            proposals: N images with ``proposal_boxes`` and, for "origin", ``level``.
        """
        boxes = convert_boxes_to_pooler_format([x.proposal_boxes for x in proposals])
        levels = self.levels(proposals)
        # also of levels without boxes, so that every layer below gets a gradient
        rows = [torch.nonzero(levels == i).flatten() for i in range(len(self.level_poolers))]
        pooled = [
            pooler(full_precision(level_features), boxes[level_rows])
            for pooler, level_features, level_rows in zip(self.level_poolers, features, rows)
        ]
        return torch.cat(pooled)[torch.argsort(torch.cat(rows))]


def _level_of_origin(pooler: LevelROIPooler, proposals: List[Instances]) -> Tensor:
    return torch.cat([x.level for x in proposals])


def _level_of_area(pooler: LevelROIPooler, proposals: List[Instances]) -> Tensor:
    return assign_boxes_to_levels(
        [x.proposal_boxes for x in proposals],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )


_LEVELS: Dict[str, Callable[[LevelROIPooler, List[Instances]], Tensor]] = {
    "origin": _level_of_origin,
    "area": _level_of_area,
}
