"""Boxes whose features are compared; constants of the step."""

from typing import List

import torch
from detectron2.layers import nms
from detectron2.structures import Boxes, Instances

from kd_d2.distillation import sigmoid_classes

from .locations import anchor_rows
from .pair import Block
from .regions import GISelect

__all__ = [
    "ROI_SETS",
    "DenseProposals",
    "GeneralInstances",
    "GroundTruth",
    "Proposals",
    "RoISet",
    "StudentBoxes",
    "inside_image",
]


class RoISet(Block):
    """Interface of sets of boxes."""

    def __call__(self, ctx) -> List[Boxes]:
        """Return the boxes of every image, in pixels of the padded input, without gradient."""
        raise NotImplementedError


def inside_image(instances: Instances, field: str, min_size: float = 1.0) -> Instances:
    """Return those whose boxes, clipped to the image, have both sides of ``min_size`` pixels.

    The boxes of ``field`` are clipped in place.
    """
    boxes = instances.get(field)
    boxes.clip(instances.image_size)
    return instances[boxes.nonempty(threshold=min_size)]


class GroundTruth(RoISet):
    """The annotated boxes."""

    def __call__(self, ctx):
        return [targets.gt_boxes for targets in ctx.gt_instances]


class Proposals(RoISet):
    """Those that a two-stage student sampled itself in its own training forward."""

    student_needs = ("proposals",)

    def bind(self, student_keys, teacher_keys):
        if "proposals" not in student_keys:
            raise ValueError("the student has no 'proposals': it is no two-stage detector")

    def __call__(self, ctx):
        return [p.proposal_boxes for p in ctx.student["proposals"]]


class DenseProposals(RoISet):
    """The boxes of a dense student that score highest in any class, after suppression."""

    student_needs = ("anchors", "codec", "pred.cls", "pred.box")

    def __init__(self, num: int = 1000, candidates: int = 2000, iou: float = 0.7):
        """
        Args:
            num: kept per image.
            candidates: per image; the best of them enter the suppression.
            iou: above this the lower of two is suppressed, whatever their classes.

        Raises:
            ValueError: one of them is out of range.
        """
        if num < 1 or candidates < 1 or not 0 <= iou <= 1:
            raise ValueError(
                f"DenseProposals: num and candidates must be positive, iou in [0, 1], got {num}, "
                f"{candidates} and {iou}"
            )
        self._num, self._candidates, self._iou = num, candidates, iou

    def bind(self, student_keys, teacher_keys):
        if "pred.cls" not in student_keys:
            raise ValueError("the student has no 'pred.cls': it is no dense detector")
        info = student_keys["pred.cls"]
        self._classes = sigmoid_classes("DenseProposals", "student", student_keys)
        self._box_dim = student_keys["pred.box"].channels // (info.channels // self._classes)

    def __call__(self, ctx):
        return [x.proposal_boxes for x in self.instances(ctx)]

    def instances(self, ctx) -> List[Instances]:
        """Return ``proposal_boxes``, ``objectness_logits`` and ``anchor``, the number of the anchor
        among those of all levels, best first."""
        return ctx.memo((self, "instances"), lambda: self._instances(ctx))

    @torch.no_grad()
    def _instances(self, ctx):
        logits = anchor_rows(ctx.student["pred.cls"], self._classes).amax(dim=2)
        deltas = anchor_rows(ctx.student["pred.box"], self._box_dim)
        anchors = Boxes.cat(ctx.student["anchors"]).tensor
        result = []
        for logits_i, deltas_i, size in zip(logits, deltas, ctx.image_sizes):
            rows = logits_i.topk(min(self._candidates, len(logits_i))).indices
            boxes = ctx.student["codec"].apply_deltas(deltas_i[rows], anchors[rows])
            found = inside_image(
                Instances(
                    size,
                    proposal_boxes=Boxes(boxes),
                    objectness_logits=logits_i[rows],
                    anchor=rows,
                ),
                "proposal_boxes",
            )
            keep = nms(found.proposal_boxes.tensor, found.objectness_logits, self._iou)
            result.append(found[keep[: self._num]])
        return result


class StudentBoxes(RoISet):
    """Boxes that the student proposes: :class:`Proposals`, or :class:`DenseProposals`."""

    def __init__(self, num: int = 1000):
        """``num``: most boxes per image of a dense student; a two-stage one samples its own."""
        self._num = num

    def bind(self, student_keys, teacher_keys):
        two_stage = "proposals" in student_keys
        self._set = Proposals() if two_stage else DenseProposals(self._num)
        self._set.bind(student_keys, teacher_keys)
        self.student_needs = self._set.student_needs

    def __call__(self, ctx):
        return self._set(ctx)


class GeneralInstances(RoISet):
    """The boxes about which two dense detectors disagree most, ``num`` an image: GID."""

    def __init__(self, num: int = 10, iou: float = 0.3, candidates: int = 3000):
        """Args: see :class:`GISelect`."""
        self.select = GISelect(num, iou, scope="image", candidates=candidates)
        self.student_needs = self.select.student_needs
        self.teacher_needs = self.select.teacher_needs

    def bind(self, student_keys, teacher_keys):
        self.select.bind(student_keys, teacher_keys)

    def __call__(self, ctx):
        return ctx.memo((self, "boxes"), lambda: self._boxes(ctx))

    def _boxes(self, ctx):
        return [
            inside_image(Instances(x.image_size, boxes=x.boxes.clone()), "boxes").boxes
            for x in self.select.instances(ctx)
        ]


# names in configs
ROI_SETS = {"gt": GroundTruth, "student": StudentBoxes, "general": GeneralInstances}
