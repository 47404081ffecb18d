"""RoIs of a dense student: boxes that it predicts itself (Sec. 4.3.2)."""

from typing import List, Mapping, Tuple

import torch
from detectron2.config import configurable
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances
from torch import Tensor

from kd_d2.blocks.locations import anchor_rows, at_anchors, rows_of_anchors
from kd_d2.blocks.roi_sets import inside_image
from kd_d2.config import choice
from kd_d2.distillation import DistillationContext, KeyInfo
from kd_d2.distillation.rcnn_tap import label_boxes

from .records import STUDENT_ROIS, RoIBatch, StudentRoIs

__all__ = ["DENSE_BRANCHES", "DenseRoIs"]

# CKD.DENSE_BRANCH -> towers whose last features are added (Table 12)
DENSE_BRANCHES = {"cls": ("cls",), "loc": ("box",), "sum": ("cls", "box")}


class DenseRoIs(StudentRoIs):
    """Boxes sampled from all that a dense student predicts, without threshold or suppression.

    Ground-truth boxes are not among them: no cell of the student has made them. A row's
    representation is what the output layer reads at the cell that predicted the box. An FCOS
    starts with hardly any positive box, a RetinaNet starts with its anchors.

    Attributes:
        outputs: whether the batches have ``cls``, ``box`` and ``anchors``.
    """

    @configurable
    def __init__(
        self,
        *,
        student_keys: Mapping[str, KeyInfo],
        branch: str = "cls",
        num_samples: int = 512,
        pos_fraction: float = 0.25,
        pos_iou: float = 0.5,
        strict_ratio: bool = False,
        outputs: bool = False,
    ):
        """
        Args:
            student_keys: what the tap knows of the student.
            branch: key of ``DENSE_BRANCHES``.
            num_samples: most boxes an image.
            pos_fraction: largest part of them that is foreground.
            pos_iou: smallest IoU of a foreground box with its ground truth.
            strict_ratio: at most (1 - pos_fraction) / pos_fraction background boxes a foreground
                box, instead of filling up to ``num_samples``.
            outputs: see above.

        Raises:
            ValueError: an unknown branch, a number out of its range, or a sum of towers of
                different widths.
        """
        towers = DENSE_BRANCHES[choice("KD.GDETKD.CKD.DENSE_BRANCH", branch, DENSE_BRANCHES)]
        _check_sampling(num_samples, pos_fraction, pos_iou)
        self._embed_keys = tuple(_last_stage(student_keys, tower) for tower in towers)
        widths = tuple(student_keys[key].channels for key in self._embed_keys)
        if len(set(widths)) > 1:
            raise ValueError(
                f"KD.GDETKD.CKD.DENSE_BRANCH 'sum' adds {' and '.join(self._embed_keys)} of the "
                f"student, which have {' and '.join(map(str, widths))} channels; use 'cls' or 'loc'"
            )
        logits = student_keys["pred.cls"]
        self.num_classes = logits.signature[0]
        self.num_anchors = logits.channels // self.num_classes
        self.embed_dims = widths[:1]
        self.rois_per_image = num_samples
        self.student_needs = ("anchors", "codec", "pred.cls", "pred.box", *self._embed_keys)
        self._box_dim = student_keys["pred.box"].channels // self.num_anchors
        self._pos_fraction, self._strict = pos_fraction, strict_ratio
        self._matcher = Matcher([pos_iou], [0, 1], allow_low_quality_matches=False)
        self.outputs = outputs

    @classmethod
    def from_config(cls, cfg, student_keys):
        node = cfg.KD.GDETKD
        return {
            "student_keys": student_keys,
            "branch": node.CKD.DENSE_BRANCH,
            "num_samples": node.DENSE.NUM_SAMPLES,
            "pos_fraction": node.DENSE.POS_FRACTION,
            "pos_iou": node.DENSE.POS_IOU,
            "strict_ratio": node.DENSE.STRICT_RATIO,
            "outputs": (node.HETERO_PRED.CLS, node.HETERO_PRED.REG) != ("off", "off"),
        }

    def collect(self, ctx):
        samples = self._samples(ctx)
        images = torch.cat([torch.full_like(x.anchor, i) for i, x in enumerate(samples)])
        numbers = torch.cat([x.anchor for x in samples])
        batch = RoIBatch(
            boxes=[x.proposal_boxes for x in samples],
            gt_classes=torch.cat([x.gt_classes for x in samples]),
            gt_boxes=torch.cat([x.gt_boxes.tensor for x in samples]),
            num_classes=self.num_classes,
            embed=sum(
                at_anchors(ctx.student[key], self.num_anchors, images, numbers)
                for key in self._embed_keys
            ),
            anchor=numbers % self.num_anchors,
        )
        if self.outputs:
            student = ctx.student
            batch.cls = rows_of_anchors(student["pred.cls"], self.num_classes, images, numbers)
            batch.box = rows_of_anchors(student["pred.box"], self._box_dim, images, numbers)
            batch.anchors = Boxes.cat(student["anchors"]).tensor[numbers]
        return [batch]

    @torch.no_grad()
    def _samples(self, ctx: DistillationContext) -> List[Instances]:
        """Return ``proposal_boxes``, ``gt_classes``, ``gt_boxes`` and ``anchor``, the number of the
        anchor among those of all levels; foreground first."""
        deltas = anchor_rows(ctx.student["pred.box"], self._box_dim)
        anchors = Boxes.cat(ctx.student["anchors"]).tensor
        numbers = torch.arange(len(anchors), device=anchors.device)
        result = []
        for deltas_i, size, targets in zip(deltas, ctx.image_sizes, ctx.gt_instances):
            boxes = Boxes(ctx.student["codec"].apply_deltas(deltas_i, anchors))
            found = Instances(size, proposal_boxes=boxes, anchor=numbers)
            found = inside_image(found, "proposal_boxes", min_size=0.0)
            (labelled,) = label_boxes(
                [found.proposal_boxes], [targets], self._matcher, self.num_classes, [size]
            )
            labelled.anchor = found.anchor
            result.append(labelled[torch.cat(self._sample(labelled.gt_classes))])
        return result

    def _sample(self, labels: Tensor) -> Tuple[Tensor, Tensor]:
        positive, negative = subsample_labels(
            labels, self.rois_per_image, self._pos_fraction, self.num_classes
        )
        if self._strict:
            most = len(positive) * (1 - self._pos_fraction) / self._pos_fraction
            negative = negative[: round(most)]
        return positive, negative


def _last_stage(student_keys: Mapping[str, KeyInfo], tower: str) -> str:
    """Return the key of what the output layer of ``tower`` reads."""
    stage = 0
    while f"head.{tower}[{stage + 1}]" in student_keys:
        stage += 1
    return f"head.{tower}[{stage}]"


def _check_sampling(num_samples: int, pos_fraction: float, pos_iou: float) -> None:
    if num_samples < 1:
        raise ValueError(f"KD.GDETKD.DENSE.NUM_SAMPLES must be at least 1, got {num_samples}")
    for name, value in (("POS_FRACTION", pos_fraction), ("POS_IOU", pos_iou)):
        if not 0 < value <= 1:
            raise ValueError(f"KD.GDETKD.DENSE.{name} must be in (0, 1], got {value}")


STUDENT_ROIS._do_register("dense", DenseRoIs)
