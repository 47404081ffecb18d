"""The student's positives of one step: what it predicts for them, and whose objects they are."""

from dataclasses import dataclass
from typing import List, Mapping, Sequence, Tuple

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.registry import Registry
from torch import Tensor

from kd_d2.blocks.locations import rows_of_anchors
from kd_d2.distillation import DistillationContext, KeyInfo
from kd_d2.losses.precision import full_precision

__all__ = [
    "STUDENT_POSITIVES",
    "DensePositives",
    "Positives",
    "StudentPositives",
    "TwoStagePositives",
    "build_student_positives",
    "index_of_gt",
]


@dataclass
class Positives:
    """P positives of all images, images in order; boxes are XYXY in pixels of the padded input.

    Attributes:
        boxes: (P, 4) predicted boxes with their graph, not clipped, fp32.
        logits: (P, K + 1) or (P, K) class logits with their graph.
        gt_boxes: (P, 4) ground-truth boxes that the matcher gave them.
        labels: (P,) classes of these.
        gt_index: (P,) their rows among the ground-truth boxes of all images, in order.
        counts: positives of each image.
    """

    boxes: Tensor
    logits: Tensor
    gt_boxes: Tensor
    labels: Tensor
    gt_index: Tensor
    counts: List[int]

    def __len__(self) -> int:
        return len(self.labels)


@torch.no_grad()
def index_of_gt(
    boxes: Tensor, labels: Tensor, images: Tensor, gt_instances: Sequence[Instances]
) -> Tensor:
    """Return which ground-truth box every positive was matched with.

    Matchers hand out copies of the boxes, so the object is the one of that image and class whose
    box is nearest: at distance 0. Of equal boxes of one class any is as good.

    Args:
        boxes, labels, images: (P, 4), (P,), (P,) matched box, its class, number of the image.
        gt_instances: of all images, M boxes in all.

    Returns:
        (P,) int64, row among the M.
    """
    gt_boxes = torch.cat([x.gt_boxes.tensor for x in gt_instances])
    gt_classes = torch.cat([x.gt_classes for x in gt_instances])
    gt_images = torch.cat([torch.full_like(x.gt_classes, i) for i, x in enumerate(gt_instances)])
    if not len(labels):
        return torch.zeros_like(labels)
    distances = torch.cdist(boxes.double(), gt_boxes.double(), p=1)
    other = (images[:, None] != gt_images) | (labels[:, None] != gt_classes)
    return distances.masked_fill(other, torch.inf).argmin(dim=1)


STUDENT_POSITIVES = Registry("DICOD_STUDENT_POSITIVES")
STUDENT_POSITIVES.__doc__ = """
Sources of the student's positives by a key that only their family of detectors has, called as
``Source(student_keys)``.
"""


class StudentPositives:
    """Interface of the sources.

    Attributes:
        student_needs: keys that a step reads.
        scores: "softmax" over K + 1 classes, the background last, or "sigmoid" over K.
        num_classes: K.
    """

    student_needs: Tuple[str, ...] = ()
    scores: str
    num_classes: int

    def __call__(self, ctx: DistillationContext) -> Positives:
        raise NotImplementedError


class DensePositives(StudentPositives):
    """Anchors that the detector's own matcher gave a class, all of them.

    RetinaNet's low-quality matches and the default boxes that SSD's ground-truth boxes claimed
    count. FCOS, ATSS and GFL, which the paper does not have, give the logits of their classes,
    without centerness or as the joint score.
    """

    def __init__(self, student_keys: Mapping[str, KeyInfo]):
        """
        Args:
            student_keys: what the tap knows of the student.

        Raises:
            ValueError: keys are missing.
        """
        self.student_needs = ("anchors", "codec", "assign", "pred.cls", "pred.box")
        _demand(student_keys, self.student_needs)
        logits, boxes = student_keys["pred.cls"], student_keys["pred.box"]
        self._width, *facts = logits.signature
        self.scores = "softmax" if "softmax" in facts else "sigmoid"
        self.num_classes = self._width - (self.scores == "softmax")
        # levels may differ in the number of anchors per cell, all have numbers of the same meaning
        self._box_dim = boxes.levels[0][1] * self._width // logits.levels[0][1]

    def __call__(self, ctx):
        student, assign = ctx.student, ctx.student["assign"]
        images, rows = assign.positive.nonzero(as_tuple=True)
        labels, gt_boxes = assign.labels[images, rows], assign.boxes[images, rows]
        deltas = rows_of_anchors(student["pred.box"], self._box_dim, images, rows)
        anchors = Boxes.cat(student["anchors"]).tensor[rows]
        return Positives(
            boxes=student["codec"].apply_deltas(full_precision(deltas), anchors),
            logits=rows_of_anchors(student["pred.cls"], self._width, images, rows),
            gt_boxes=gt_boxes,
            labels=labels,
            gt_index=index_of_gt(gt_boxes, labels, images, ctx.gt_instances),
            counts=assign.positive.sum(dim=1).tolist(),
        )


class TwoStagePositives(StudentPositives):
    """Foreground proposals that the RoI head sampled, ground-truth boxes among them.

    Of a cascade, those of the last stage, whose boxes are its result (ours: the paper has none).
    Of a regression by class, the box of the object's class counts. The boxes' gradient ends at the
    deltas: proposals are constants.
    """

    def __init__(self, student_keys: Mapping[str, KeyInfo]):
        """
        Args:
            student_keys: what the tap knows of the student.

        Raises:
            ValueError: keys are missing.
        """
        stage = sum(key.startswith("proposals[") for key in student_keys) - 1
        names = ("proposals", "roi.cls", "roi.box", "roi.codec")
        self.student_needs = tuple(f"{name}[{stage}]" for name in names)
        _demand(student_keys, self.student_needs)
        logits, boxes = (student_keys[f"roi.{name}[{stage}]"] for name in ("cls", "box"))
        self.scores = "sigmoid" if "use_sigmoid_ce" in logits.signature else "softmax"
        # with sigmoids the background's logit is there, but neither trained nor used
        self.num_classes = logits.channels - 1
        # 1: one box for all classes
        self._num_boxes = boxes.channels // 4

    def __call__(self, ctx):
        proposals, logits, deltas, codec = (ctx.student[key] for key in self.student_needs)
        labels = torch.cat([p.gt_classes for p in proposals])
        is_positive = (labels >= 0) & (labels < self.num_classes)
        counts = [x.sum() for x in is_positive.split([len(p) for p in proposals])]
        images = torch.cat([torch.full_like(p.gt_classes, i) for i, p in enumerate(proposals)])
        (rows,) = is_positive.nonzero(as_tuple=True)
        labels, images = labels[rows], images[rows]
        gt_boxes = torch.cat([p.gt_boxes.tensor for p in proposals])[rows]
        boxes = torch.cat([p.proposal_boxes.tensor for p in proposals])[rows].detach()
        deltas = full_precision(deltas)[rows].view(len(rows), self._num_boxes, 4)
        which = labels if self._num_boxes > 1 else torch.zeros_like(labels)
        deltas = deltas[torch.arange(len(rows), device=labels.device), which]
        return Positives(
            boxes=codec.apply_deltas(deltas, boxes),
            logits=logits[rows] if self.scores == "softmax" else logits[rows, :-1],
            gt_boxes=gt_boxes,
            labels=labels,
            gt_index=index_of_gt(gt_boxes, labels, images, ctx.gt_instances),
            counts=torch.stack(counts).tolist(),
        )


STUDENT_POSITIVES._do_register("proposals", TwoStagePositives)
STUDENT_POSITIVES._do_register("pred.cls", DensePositives)


def build_student_positives(student_keys: Mapping[str, KeyInfo]) -> StudentPositives:
    """Return the source of positives of the student's family.

    Raises:
        ValueError: the student is of none, or lacks keys of its family.
    """
    for key, source in STUDENT_POSITIVES:
        if key in student_keys:
            return source(student_keys)
    raise ValueError(
        "DICOD needs a student with an RoI head ('proposals') or a dense one ('pred.cls'), e.g. "
        f"SSD, RetinaNet or Faster R-CNN; this one has {', '.join(sorted(student_keys))}"
    )


def _demand(student_keys: Mapping[str, KeyInfo], needs: Sequence[str]) -> None:
    missing = [key for key in needs if key not in student_keys]
    if missing:
        raise ValueError(
            f"DICOD reads {', '.join(needs)} of this student, whose tap lacks "
            f"{', '.join(missing)}; use e.g. SSD, RetinaNet or Faster R-CNN"
        )
