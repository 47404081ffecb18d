"""Adaptive training sample selection."""

from typing import List, Optional

import torch
from detectron2.structures import Boxes
from torch import Tensor

from .paired_iou import paired_iou

__all__ = ["ATSSAssigner", "atss_candidates", "atss_threshold"]

# A positive anchor's centre is inside its box by more than this on every side, pixels.
_MIN_INSIDE = 0.01


def atss_threshold(ious: Tensor, mask: Tensor) -> Tensor:
    """Mean plus standard deviation of the candidates' IoUs, per ground-truth box.

    The deviation has Bessel's correction; it is 0 for a single candidate. For 0.1, 0.2, 0.6:
    0.3 + 0.264575 = 0.564575.

    Args:
        ious: (M, C) IoU of each box with its candidates.
        mask: bool (M, C), False for entries that are no candidates.

    Returns:
        (M,) thresholds; 0 for a box without candidates.
    """
    count = mask.sum(dim=1).to(ious.dtype)
    mean = (ious * mask).sum(dim=1) / count.clamp(min=1)
    squares = ((ious - mean[:, None]) * mask).square().sum(dim=1)
    return mean + (squares / (count - 1).clamp(min=1)).sqrt()


def atss_candidates(anchors: List[Boxes], gt_boxes: Boxes, valid: Tensor, topk: int = 9) -> Tensor:
    """The anchors of each level whose centres are nearest to that of a box.

    Of equally distant ones the first in grid order; all of them on a smaller level.

    Args:
        anchors: per level (Ri, 4).
        gt_boxes: (M, 4), same coordinates.
        valid: bool (R,) over all levels.
        topk: per box and level.

    Returns:
        int64 (M, C), indices over all levels; invalid anchors only where valid ones lack.
    """
    gt_centers = gt_boxes.get_centers()
    candidates, start = [], 0
    for level in anchors:
        stop = start + len(level)
        offsets = level.get_centers()[None] - gt_centers[:, None]
        distances = offsets.square().sum(dim=2)
        distances.masked_fill_(~valid[start:stop], float("inf"))
        # topk leaves open which of equal distances it takes, and anchor grids have many.
        order = distances.argsort(dim=1, stable=True)
        candidates.append(order[:, :topk] + start)
        start = stop
    return torch.cat(candidates, dim=1)


class ATSSAssigner:
    """Assigns ground-truth boxes to anchors as in ATSS (Zhang et al., CVPR 2020, algorithm 1).

    Candidates of a box are, on each level, the k anchors whose centres are nearest to its centre
    (all of them on a smaller level; of equally distant ones the first in grid order). Positive
    is a candidate whose IoU with the box reaches the mean plus the standard deviation over all
    candidates and whose centre is inside the box by more than 0.01 pixels. An anchor that
    several boxes claim goes to the one with the highest IoU, the first of equals.
    """

    def __init__(self, topk: int = 9):
        """
        Args:
            topk: k, candidates per box and level.

        Raises:
            ValueError: ``topk`` is less than 1.
        """
        if topk < 1:
            raise ValueError(f"ATSS_TOPK must be at least 1, got {topk}")
        self.topk = int(topk)

    @torch.no_grad()
    def __call__(
        self, anchors: List[Boxes], gt_boxes: Boxes, valid: Optional[Tensor] = None
    ) -> Tensor:
        """The box that each anchor is assigned to.

        Args:
            anchors: per level (Ri, 4), XYXY in absolute pixels.
            gt_boxes: (M, 4), same coordinates.
            valid: bool (R,) over all levels, R = sum of Ri; others cannot be candidates.

        Returns:
            int64 (R,), index of the box in 0..M-1, or -1.
        """
        boxes = Boxes.cat(anchors)
        num_anchors, num_gt = len(boxes), len(gt_boxes)
        if num_gt == 0:
            return torch.full((num_anchors,), -1, dtype=torch.long, device=boxes.device)
        if valid is None:
            valid = torch.ones(num_anchors, dtype=torch.bool, device=boxes.device)

        candidates = atss_candidates(anchors, gt_boxes, valid, self.topk)
        is_candidate = valid[candidates]
        ious = paired_iou(boxes.tensor[candidates], gt_boxes.tensor[:, None])
        threshold = atss_threshold(ious, is_candidate)
        centers = boxes.get_centers()[candidates]  # (M, C, 2)
        low, high = gt_boxes.tensor[:, None].split(2, dim=2)
        margin = torch.cat((centers - low, high - centers), dim=2).amin(dim=2)
        positive = is_candidate & (ious >= threshold[:, None]) & (margin > _MIN_INSIDE)

        claims = ious.new_full((num_gt, num_anchors), -1.0)
        claims.scatter_(1, candidates, torch.where(positive, ious, -1.0))
        best_iou, best_gt = claims.max(dim=0)
        return torch.where(best_iou >= 0, best_gt, -1)
