"""The student's RoIs of one step: boxes, labels, and what its head made of them."""

from dataclasses import dataclass, replace
from typing import List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry
from torch import Tensor

from kd_d2.distillation import DistillationContext, KeyInfo

__all__ = [
    "STUDENT_ROIS",
    "RoIBatch",
    "StudentRoIs",
    "TwoStageRoIs",
    "build_student_rois",
    "student_family",
]


@dataclass
class RoIBatch:
    """R RoIs of one stage of the student's head, images in order.

    Attributes:
        boxes: one ``Boxes`` an image, absolute pixels of the padded input, without graph.
        gt_classes: (R,) int64 in 0..K, K is background.
        gt_boxes: (R, 4) matched ground truth; zeros on images without any.
        num_classes: K.
        embed: (R, D_s) the student's representation with its graph: input of the predictor, of
            dense students at the cell that made the box.
        anchor: (R,) int64 index of the anchor inside its cell; None for two-stage students.
        cls: logits with graph, (R, K+1), of dense students (R, K).
        box: deltas with graph, (R, 4K) or (R, 4).
        anchors: (R, 4) anchors that the deltas of dense students refer to.
        stage: number of the cascade stage.
    """

    boxes: List[Boxes]
    gt_classes: Tensor
    gt_boxes: Tensor
    num_classes: int
    embed: Tensor
    anchor: Optional[Tensor] = None
    cls: Optional[Tensor] = None
    box: Optional[Tensor] = None
    anchors: Optional[Tensor] = None
    stage: int = 0

    @property
    def positive(self) -> Tensor:
        """(R,) bool, foreground."""
        return (self.gt_classes >= 0) & (self.gt_classes < self.num_classes)

    @property
    def counts(self) -> List[int]:
        """RoIs of each image."""
        return [len(boxes) for boxes in self.boxes]

    def select(self, mask: Tensor) -> "RoIBatch":
        """Return the rows at which ``mask`` (R,) bool is True."""
        rows = {
            name: None if getattr(self, name) is None else getattr(self, name)[mask]
            for name in ("gt_classes", "gt_boxes", "embed", "anchor", "cls", "box", "anchors")
        }
        boxes = [b[m] for b, m in zip(self.boxes, mask.split(self.counts))]
        return replace(self, boxes=boxes, **rows)


STUDENT_ROIS = Registry("GDETKD_STUDENT_ROIS")
STUDENT_ROIS.__doc__ = """
Sources of the student's RoIs by family of detectors, called as ``Family(cfg, student_keys)``.
"""


class StudentRoIs:
    """Interface of the sources of RoIs.

    Attributes:
        student_needs: keys that a step reads.
        num_stages: length of the list that a call returns.
        embed_dims: D_s of each stage.
        num_anchors: anchors of a cell, each with its own adapter in CKD; 0 for two-stage students.
        rois_per_image: most RoIs that an image gives.
    """

    student_needs: Tuple[str, ...] = ()
    num_stages: int = 1
    embed_dims: Tuple[int, ...] = ()
    num_anchors: int = 0
    rois_per_image: int = 0

    def __call__(self, ctx: DistillationContext) -> List[RoIBatch]:
        """Return the RoIs of this step, one batch a stage; made once a step."""
        return ctx.memo((self, "rois"), lambda: self.collect(ctx))

    def collect(self, ctx: DistillationContext) -> List[RoIBatch]:
        raise NotImplementedError


class TwoStageRoIs(StudentRoIs):
    """What a two-stage student sampled itself in its own training forward.

    Of cascades, every stage has boxes, labels and outputs of its own; Detectron2 drops boxes that
    became empty, so later stages may have fewer.
    """

    @configurable
    def __init__(self, *, student_keys: Mapping[str, KeyInfo], rois_per_image: int):
        """
        Args:
            student_keys: what the tap knows of the student.
            rois_per_image: MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE.
        """
        stages = 0
        while f"proposals[{stages}]" in student_keys:
            stages += 1
        self.num_stages = stages
        self.rois_per_image = rois_per_image
        self.embed_dims = tuple(student_keys[f"roi.embed[{k}]"].channels for k in range(stages))
        self.num_classes = student_keys["roi.cls"].channels - 1
        self.student_needs = tuple(
            f"{name}[{k}]"
            for k in range(stages)
            for name in ("proposals", "roi.embed", "roi.cls", "roi.box")
        )

    @classmethod
    def from_config(cls, cfg, student_keys):
        return {
            "student_keys": student_keys,
            "rois_per_image": cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
        }

    def collect(self, ctx):
        return [self._stage(ctx.student, k) for k in range(self.num_stages)]

    def _stage(self, student, stage: int) -> RoIBatch:
        proposals = student[f"proposals[{stage}]"]
        return RoIBatch(
            boxes=[Boxes(p.proposal_boxes.tensor.detach()) for p in proposals],
            gt_classes=torch.cat([p.gt_classes for p in proposals]),
            gt_boxes=torch.cat([p.gt_boxes.tensor for p in proposals]),
            num_classes=self.num_classes,
            embed=student[f"roi.embed[{stage}]"],
            cls=student[f"roi.cls[{stage}]"],
            box=student[f"roi.box[{stage}]"],
            stage=stage,
        )


STUDENT_ROIS._do_register("two_stage", TwoStageRoIs)


def student_family(student_keys: Mapping[str, KeyInfo]) -> str:
    """Return "two_stage" or "dense".

    Raises:
        ValueError: the student is neither.
    """
    families: Sequence[Tuple[str, str]] = (("proposals", "two_stage"), ("pred.cls", "dense"))
    for key, family in families:
        if key in student_keys:
            return family
    raise ValueError(
        "GDetKD needs a two-stage student ('proposals') or a dense one ('pred.cls'); "
        f"this one has {', '.join(sorted(student_keys))}"
    )


def build_student_rois(cfg, student_keys: Mapping[str, KeyInfo]) -> StudentRoIs:
    """Return the source of RoIs of the student's family."""
    return STUDENT_ROIS.get(student_family(student_keys))(cfg, student_keys)
