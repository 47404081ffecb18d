"""Anchors that belong to boxes other than the ground truth."""

import torch
from detectron2.structures import Boxes, Instances

from .base import AnchorRegion

__all__ = ["Matched"]


class Matched(AnchorRegion):
    """1 at the anchors of general instances: those that the student's matcher gives to one of them.

    FCOS matches by the size of objects and levels; with ``inside``, all points inside of one count
    instead. Response loss of GID. For Python code only: a config cannot name the boxes.
    """

    def __init__(self, boxes, inside: bool = False):
        """
        Args:
            boxes: a :class:`kd_d2.blocks.RoISet`.
            inside: see above.
        """
        self._boxes, self._inside = boxes, inside

    def bind(self, student_keys, teacher_keys):
        super().bind(student_keys, teacher_keys)
        if "assign" not in student_keys:
            raise ValueError("Matched needs 'assign' of the student, which it does not have")
        self._boxes.bind(student_keys, teacher_keys)
        self.student_needs = ("anchors", *self._boxes.student_needs)
        self.teacher_needs = self._boxes.teacher_needs

    def anchors(self, ctx):
        found = self._boxes(ctx)
        anchors = ctx.student["anchors"]
        if self._inside:
            centers = Boxes.cat(anchors).get_centers()
            return torch.stack([_inside(centers, boxes.tensor) for boxes in found])
        model = ctx.student.model
        targets = [
            Instances(size, gt_boxes=boxes, gt_classes=boxes.tensor.new_zeros(len(boxes)).long())
            for size, boxes in zip(ctx.image_sizes, found)
        ]
        labels, _ = model.label_anchors(anchors, targets)
        return (torch.stack(labels) == 0).float()


def _inside(centers: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """(R,) 1 where a point lies inside of a box, not on its border."""
    low, high = centers[:, None] - boxes[:, :2], boxes[:, 2:] - centers[:, None]
    return (torch.cat((low, high), dim=2).amin(dim=2) > 0).any(dim=1).float()
