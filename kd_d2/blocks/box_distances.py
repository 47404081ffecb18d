"""Distances between boxes: raw predictions are decoded with the student's codec first."""

from typing import Tuple

import torch
from detectron2.structures import Boxes

from kd_d2.losses.box import giou_loss, iou_log_loss

from .distances import Distance
from .pair import Pair
from .regions import assignment_of
from .registry import KD_DISTANCES

__all__ = ["BoxDistance", "GIoU", "LogIoU", "SideL1", "TeacherBounded", "boxes_of"]


def boxes_of(ctx, raw: torch.Tensor, pair: Pair) -> torch.Tensor:
    """Return raw dense predictions (N, R, D) as boxes (N, R, 4), XYXY in pixels, not clipped."""
    levels = ctx.student["anchors"]
    anchors = (Boxes.cat(levels) if pair.level is None else levels[pair.level]).tensor
    anchors = anchors.expand(len(raw), -1, -1).reshape(-1, 4)
    boxes = ctx.student["codec"].apply_deltas(raw.flatten(0, 1), anchors)
    return boxes.view(*raw.shape[:2], 4)


class BoxDistance(Distance):
    """Base of distances between the decoded boxes of the pairs of ``DenseSource("box")``."""

    student_needs = ("anchors", "codec")

    def __call__(self, ctx, pair):
        boxes = (boxes_of(ctx, x, pair) for x in (pair.student, pair.teacher))
        return self.distances(*boxes)

    def distances(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Return (N, R) from boxes (N, R, 4)."""
        raise NotImplementedError


def _paired(loss, student, teacher):
    return loss(student.flatten(0, 1), teacher.flatten(0, 1)).view(student.shape[:2])


@KD_DISTANCES.register()
class GIoU(BoxDistance):
    """1 - GIoU of the boxes."""

    def distances(self, student, teacher):
        return _paired(giou_loss, student, teacher)


@KD_DISTANCES.register()
class LogIoU(BoxDistance):
    """-ln IoU of the boxes."""

    def distances(self, student, teacher):
        return _paired(iou_log_loss, student, teacher)


@KD_DISTANCES.register()
class SideL1(Distance):
    """Absolute difference of the numbers that describe a box, summed over the four.

    These are the raw predictions (deltas) as they are; for distributions (GFL) the expected
    distances in strides.
    """

    student_needs = ("codec",)

    def __call__(self, ctx, pair):
        expected = getattr(ctx.student["codec"], "distances", None)
        if expected is not None:
            pair = pair.map(lambda x: expected(x.flatten(0, 1)).view(*x.shape[:2], 4))
        return (pair.student - pair.teacher).abs().sum(dim=-1)


@KD_DISTANCES.register()
class TeacherBounded(Distance):
    """Squared error of the student's box, where it is worse than the teacher's, else 0.

    e_s if e_s + margin > e_t, with e the squared distance of a decoded box to the ground truth of
    its anchor (Chen et al., Learning Efficient Object Detection Models with Knowledge
    Distillation, NIPS 2017). Only known from the paper, unverified; it takes the error of the
    deltas. Here the sides are in units of the ground truth's width and height (ours), so that all
    codecs are alike. Use it at positives: other anchors have no ground truth.
    """

    student_needs = ("anchors", "codec", "assign")

    def __init__(self, margin: float = 0.0):
        """Raises ``ValueError`` if ``margin`` is negative."""
        if not margin >= 0:
            raise ValueError(f"TeacherBounded: margin must not be negative, got {margin}")
        self._margin = margin

    def __call__(self, ctx, pair):
        target = assignment_of(ctx).boxes
        if pair.level is not None:
            sizes = [len(boxes) for boxes in ctx.student["anchors"]]
            target = target.split(sizes, dim=1)[pair.level]
        unit = (target[..., 2:] - target[..., :2]).clamp(min=1).repeat(1, 1, 2)
        ours, theirs = self._errors(ctx, pair, target, unit)
        return torch.where(ours + self._margin > theirs, ours, 0.0)

    @staticmethod
    def _errors(ctx, pair, target, unit) -> Tuple[torch.Tensor, torch.Tensor]:
        boxes = (boxes_of(ctx, x, pair) for x in (pair.student, pair.teacher))
        ours, theirs = (((b - target) / unit).square().sum(dim=-1) for b in boxes)
        return ours, theirs
