"""Which anchors are positive for the refinement module: a range of scales and a central region."""

from typing import List, Sequence

import torch
from detectron2.structures import Boxes
from torch import Tensor

__all__ = ["CenterAssigner"]


class CenterAssigner:
    """Assigns ground truth to the anchors in its centre, on the level of its scale (Sec. 3.2).

    No overlap is looked at, and nothing is ignored: an anchor without ground truth is a negative.
    Ours: the scale is sqrt(w * h), ranges are half-open so that they do not overlap, and of
    several boxes that an anchor is in the centre of it gets the smallest, of equal ones the first.
    """

    def __init__(
        self,
        *,
        anchor_sides: Sequence[float],
        eta: Sequence[float] = (1.0, 2.0),
        center_ratio: float = 0.3,
        fallback_nearest: bool = False,
    ):
        """
        Args:
            anchor_sides: S of each level in pixels, finest first.
            eta: a level is responsible for scales in [eta[0] * S, eta[1] * S); the finest has no
                lower, the coarsest no upper bound.
            center_ratio: sides of the central region as share of those of the box.
            fallback_nearest: a box that no anchor is in the centre of gets the nearest one of its
                levels (of equally near ones the first), unless a smaller box has it.

        Raises:
            ValueError: ``eta`` is not an increasing pair of positive numbers, or ``center_ratio``
                is not in (0, 1].
        """
        if len(eta) != 2 or not 0 < eta[0] < eta[1]:
            raise ValueError(
                "MODEL.MIMICDET.REFINE.ETA must be two positive numbers, the smaller one first, "
                f"got {tuple(eta)}"
            )
        if not 0 < center_ratio <= 1:
            raise ValueError(
                f"MODEL.MIMICDET.REFINE.CENTER_RATIO must be in (0, 1], got {center_ratio}"
            )
        self.lower = [eta[0] * side for side in anchor_sides]
        self.upper = [eta[1] * side for side in anchor_sides]
        self.lower[0], self.upper[-1] = 0.0, float("inf")
        self.center_ratio = center_ratio
        self.fallback_nearest = fallback_nearest

    @torch.no_grad()
    def __call__(self, anchors: List[Boxes], gt_boxes: Boxes) -> Tensor:
        """Return the index of each anchor's ground truth, -1 for negatives; (A,) int64.

        Args:
            anchors: of each level, A in total.
            gt_boxes: M boxes of one image, possibly none.
        """
        num_anchors, num_boxes = sum(map(len, anchors)), len(gt_boxes)
        if num_boxes == 0:  # torch cannot reduce an empty dimension
            return torch.full((num_anchors,), -1, device=gt_boxes.device)
        on_level = self._on_level(anchors, gt_boxes)
        distance = _distances(anchors, gt_boxes)
        size = (gt_boxes.tensor[:, 2:] - gt_boxes.tensor[:, :2])[:, None]
        in_center = (distance <= self.center_ratio / 2 * size).all(dim=-1)
        candidate = on_level & in_center
        if self.fallback_nearest:
            candidate |= _nearest(on_level, distance) & ~candidate.any(dim=1, keepdim=True)
        return _smallest(candidate, gt_boxes.area())

    def _on_level(self, anchors: List[Boxes], gt_boxes: Boxes) -> Tensor:
        """Whether the level of each anchor is responsible for each box, (M, A)."""
        scale = gt_boxes.area().sqrt()[:, None]
        lower, upper = scale.new_tensor([self.lower, self.upper])
        responsible = (lower <= scale) & (scale < upper)
        counts = torch.as_tensor([len(x) for x in anchors], device=scale.device)
        return responsible.repeat_interleave(counts, dim=1)


def _distances(anchors: List[Boxes], gt_boxes: Boxes) -> Tensor:
    """Distances in x and y between the centres of boxes and anchors in pixels, (M, A, 2)."""
    centers = Boxes.cat(anchors).get_centers()
    return (gt_boxes.get_centers()[:, None] - centers[None]).abs()


def _nearest(on_level: Tensor, distance: Tensor) -> Tensor:
    """Mark, in each row, the nearest anchor of the levels in question, (M, A)."""
    squared = distance.square().sum(dim=-1).masked_fill(~on_level, float("inf"))
    minimal = on_level & (squared == squared.amin(dim=1, keepdim=True))
    return minimal & (minimal.cumsum(dim=1) == 1)


def _smallest(candidate: Tensor, area: Tensor) -> Tensor:
    """Row of the smallest box among each column's candidates, -1 if there is none, (A,)."""
    # ranks are unique; the position of a minimum among equal areas would depend on the device
    order = torch.argsort(area, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    best = rank[:, None].expand_as(candidate).masked_fill(~candidate, len(order)).amin(dim=0)
    return torch.cat((order, order.new_tensor([-1])))[best]
