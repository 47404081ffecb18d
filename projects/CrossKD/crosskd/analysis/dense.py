"""Predictions and targets of all positions of a batch, in common units."""

from typing import Callable

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector

from kd_d2.blocks import anchor_rows
from kd_d2.distillation.registry import FamilyRegistry
from kd_d2.modeling.layers import paired_iou
from kd_d2.modeling.meta_arch import GFL

from ..regions import Positions
from .observer import Observation

__all__ = ["CLASS_TARGETS", "DenseBatch"]

CLASS_TARGETS = FamilyRegistry("CLASS_TARGETS")
CLASS_TARGETS.__doc__ = """
By meta-architecture, functions ``(decoded, matched: both (P, 4)) -> (P,)``: the score that its
classification loss aims at in the class of a positive.
"""


@CLASS_TARGETS.register_for(DenseDetector)
def one(decoded, matched):
    """The target of focal losses."""
    return torch.ones_like(decoded[:, 0])


@CLASS_TARGETS.register_for(GFL)
def box_quality(decoded, matched):
    """IoU of the student's own box with the ground truth: quality focal loss."""
    return paired_iou(decoded, matched)


class DenseBatch:
    """N images with R positions (anchors) each, without graph.

    Attributes:
        positions: :class:`~kd_d2.projects.crosskd.regions.Positions` of the student's assigner;
            ``counted`` leaves out ignored anchors and padding that only larger images of the
            batch cause, for every detector.
        labels: (N, R); a class where ``positions.positive``.
        student_scores, teacher_scores: (N, R, K), sigma of the logits.
        num_anchors: per cell.
        grid_sizes: (H, W) per level.
        strides: per level, pixels.
    """

    def __init__(self, seen: Observation):
        """
        Args:
            seen: with the keys of :data:`.observer.PREDICTIONS`.
        """
        student, self._seen = seen.student, seen
        self.positions = Positions(
            seen.model, student["anchors"], student["assign"], seen.image_sizes, masked=True
        )
        self.labels = student["assign"].labels
        num_classes = seen.model.num_classes
        self.student_scores, self.teacher_scores = (
            anchor_rows(side["pred.cls"], num_classes).sigmoid() for side in (student, seen.teacher)
        )
        self.grid_sizes = [tuple(level.shape[-2:]) for level in student["pred.cls"]]
        self.num_anchors = student["pred.cls"][0].shape[1] // num_classes
        self.strides = list(seen.model.anchor_generator.strides)

    def decoded(self, side: str) -> torch.Tensor:
        """(P, 4) boxes that "student" or "teacher" predicts at the positives, XYXY, pixels."""
        codec = self._seen.student["codec"]
        raw = anchor_rows(getattr(self._seen, side)["pred.box"], getattr(codec, "box_dim", 4))
        return codec.apply_deltas(raw[self.positions.positive], self._anchors())

    def matched(self) -> torch.Tensor:
        """(P, 4) ground truth of the positives."""
        return self.positions.boxes[self.positions.positive]

    def distances(self, boxes: torch.Tensor) -> torch.Tensor:
        """(P, 4) left, top, right, bottom of boxes of the positives, from the centres of their
        anchors, in strides."""
        anchors = self._anchors()
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        strides = torch.cat(
            [
                anchors.new_full((height * width * self.num_anchors,), stride)
                for (height, width), stride in zip(self.grid_sizes, self.strides)
            ]
        ).expand_as(self.positions.positive)[self.positions.positive]
        sides = torch.cat([centers - boxes[:, :2], boxes[:, 2:] - centers], dim=1)
        return sides / strides[:, None]

    def class_targets(self, kind: str = "detector") -> torch.Tensor:
        """(P,) score that the ground truth asks for in the class of each positive.

        Args:
            kind: "detector": what its loss uses, for GFL the IoU of the student's present box;
                "one": 1 for every detector.

        Raises:
            ValueError: another kind.
        """
        if kind not in ("detector", "one"):
            raise ValueError(f"the kind of class target must be 'detector' or 'one', got '{kind}'")
        target: Callable = CLASS_TARGETS.find(self._seen.model) if kind == "detector" else one
        return target(self.decoded("student"), self.matched())

    def _anchors(self) -> torch.Tensor:
        return self.positions.anchors.expand_as(self.positions.boxes)[self.positions.positive]
