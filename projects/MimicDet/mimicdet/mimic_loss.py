"""The loss by which the S-head follows the T-head (Sec. 3.4, eq. 1)."""

from typing import Callable, Dict, Iterable, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor
from torch.nn import functional as F

from kd_d2.distillation import LossSchedule
from kd_d2.losses.precision import full_precision

from .options import choice
from .outputs import HeadOutput
from .rows import positive_rows, random_rows
from .variants import head_variant

__all__ = ["MimicLoss", "cosine_distance", "mimic_losses"]

_Activation = Callable[[Tensor], Tensor]

# what the classification term compares: output, activation -> (R, D)
_CLS_TARGETS: Dict[str, Callable[[HeadOutput, _Activation], Tensor]] = {
    "logits": lambda output, activation: output.logits,
    "feature": lambda output, activation: activation(output.cls_feature),
}
_FEATURE_POINTS: Dict[str, _Activation] = {"post_relu": F.relu, "pre_relu": lambda x: x}


def cosine_distance(student: Tensor, teacher: Tensor, eps: float = 0.01) -> Tensor:
    """Mean of 1 - cos over rows: one of the two terms of eq. 1.

    cos = s.t / (max(|s|, eps) max(|t|, eps)). (1, 2, 3) and (2, 4, 6) give 0, orthogonal rows 1,
    opposite ones 2, (1, 0) and (1, 1) 0.292893, a zero row 1. The gradient of a row at ``student``
    is at most 1 / eps in norm before the mean; at s = 0 it is -t / (|t| eps).

    Args:
        student, teacher: (R, D); half precision is cast to fp32.
        eps: smallest norm, in the unit of the rows. Ours: the usual 1e-8 gives gradients of 1e8
            at a row of zeros, which happens when all taps lie outside of the map.

    Returns:
        fp32 (or fp64) scalar; 0, connected to both, for R = 0.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"S-head and T-head must give vectors of one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: set MODEL.MIMICDET.S_HEAD.FEAT_DIM to the T-head's "
            "MODEL.ROI_BOX_HEAD.FC_DIM, give both the same MODEL.ROI_HEADS.NUM_CLASSES and boxes."
        )
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = full_precision(student), full_precision(teacher)
        distances = 1 - F.cosine_similarity(student, teacher, dim=1, eps=eps)
        return distances.sum() / max(len(distances), 1)


def mimic_losses(
    student: HeadOutput,
    teacher: HeadOutput,
    *,
    split: bool = True,
    cls_target: str = "logits",
    feature_point: str = "post_relu",
    detach_teacher: bool = True,
    eps: float = 0.01,
) -> Dict[str, Tensor]:
    """Return the terms of eq. 1, unweighted: ``loss_mimic_cls`` and ``loss_mimic_reg``.

    The paper names the (K+1)-d logits and the 1024-d regression feature as targets; eq. 1 calls
    both features. Where the heads are not split, one term ``loss_mimic_feature`` on the last
    feature vectors replaces the two (Sec. 5.1).

    Args:
        student, teacher: outputs for the same R boxes in the same order.
        split: whether the heads have a feature vector for each branch.
        cls_target: "logits" or "feature".
        feature_point: "post_relu" (the predictors' input) or "pre_relu"; of both heads.
        detach_teacher: no gradient reaches the teacher. Ours: without it joint training lowers
            the loss by moving the teacher to the student.
        eps: see :func:`cosine_distance`.

    Raises:
        ValueError: a name that does not exist, or outputs of different shapes.
    """
    activation = choice("MIMIC.FEATURE_POINT", feature_point, _FEATURE_POINTS)
    target = choice("MIMIC.CLS_TARGET", cls_target, _CLS_TARGETS)
    if detach_teacher:
        teacher = teacher.detach()

    def distance(vectors: Callable[[HeadOutput], Tensor]) -> Tensor:
        return cosine_distance(vectors(student), vectors(teacher), eps)

    reg = distance(lambda output: activation(output.reg_feature))
    if not split:
        return {"loss_mimic_feature": reg}
    return {
        "loss_mimic_cls": distance(lambda output: target(output, activation)),
        "loss_mimic_reg": reg,
    }


class MimicLoss:
    """Weighted mimic losses of B_m: the T-head's boxes, or some of them."""

    @configurable
    def __init__(
        self,
        *,
        weight: float = 1.0,
        cls_weight: float = 1.0,
        reg_weight: float = 1.0,
        schedule: LossSchedule = LossSchedule(),
        boxes: str = "all",
        num_samples: int = -1,
        num_classes: int = 80,
        eps: float = 0.01,
        split: bool = True,
        cls_target: str = "logits",
        feature_point: str = "post_relu",
        detach_teacher: bool = True,
    ):
        """
        Args:
            weight: factor of every term.
            cls_weight, reg_weight: further factors of the two terms of split heads.
            schedule: factor of every term by iteration.
            boxes: "all" or "objects".
            num_samples: most of these boxes of an image, drawn at random; -1: all.
            num_classes: K, the class of the background.
            eps: positive.
            split, cls_target, feature_point, detach_teacher: see :func:`mimic_losses`.

        Raises:
            ValueError: a value out of its range, or a name that does not exist.
        """
        factors = {"WEIGHT": weight, "CLS_WEIGHT": cls_weight, "REG_WEIGHT": reg_weight}
        for key, value in factors.items():
            if value < 0:
                raise ValueError(f"MODEL.MIMICDET.MIMIC.{key} must not be negative, got {value}")
        if num_samples != -1 and num_samples <= 0:
            raise ValueError(
                "MODEL.MIMICDET.MIMIC.NUM_SAMPLES must be -1 (all boxes) or positive, got "
                f"{num_samples}; to switch mimicking off set MIMIC.WEIGHT to 0"
            )
        if not eps > 0:
            raise ValueError(f"MODEL.MIMICDET.MIMIC.EPS must be positive, got {eps}")
        choice("MIMIC.CLS_TARGET", cls_target, _CLS_TARGETS)
        choice("MIMIC.FEATURE_POINT", feature_point, _FEATURE_POINTS)
        self.weight = weight
        self.term_weights = {"loss_mimic_cls": cls_weight, "loss_mimic_reg": reg_weight}
        self.schedule = schedule
        self.only_objects = choice("MIMIC.BOXES", boxes, {"all": False, "objects": True})
        self.num_samples = num_samples
        self.num_classes = num_classes
        self._options = {
            "eps": eps,
            "split": split,
            "cls_target": cls_target,
            "feature_point": feature_point,
            "detach_teacher": detach_teacher,
        }

    @classmethod
    def from_config(cls, cfg):
        """
        Raises:
            ValueError: the features of both heads differ in width.
        """
        node = cfg.MODEL.MIMICDET.MIMIC
        widths = cfg.MODEL.MIMICDET.S_HEAD.FEAT_DIM, cfg.MODEL.ROI_BOX_HEAD.FC_DIM
        if widths[0] != widths[1]:
            raise ValueError(
                f"MODEL.MIMICDET.S_HEAD.FEAT_DIM is {widths[0]} and the T-head's "
                f"MODEL.ROI_BOX_HEAD.FC_DIM {widths[1]}, but the cosine of their features needs "
                "equal widths: give both one value"
            )
        return {
            "weight": node.WEIGHT,
            "cls_weight": node.CLS_WEIGHT,
            "reg_weight": node.REG_WEIGHT,
            "schedule": LossSchedule.from_node(node.SCHEDULE, cfg.SOLVER.MAX_ITER),
            "boxes": node.BOXES,
            "num_samples": node.NUM_SAMPLES,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "eps": node.EPS,
            "split": head_variant(cfg).split,
            "cls_target": node.CLS_TARGET,
            "feature_point": node.FEATURE_POINT,
            "detach_teacher": node.DETACH_TEACHER,
        }

    def weights(self, names: Iterable[str], iteration: int = 0) -> Dict[str, float]:
        """Return the factor of each term of :meth:`distances` at an iteration."""
        factor = self.weight * self.schedule(iteration)
        return {name: factor * self.term_weights.get(name, 1.0) for name in names}

    def weighted(self, terms: Dict[str, Tensor], iteration: int = 0) -> Dict[str, Tensor]:
        """Return the terms of :meth:`distances` times their factors at ``iteration``."""
        weights = self.weights(terms, iteration)
        return {name: weights[name] * value for name, value in terms.items()}

    def distances(
        self, student: HeadOutput, teacher: HeadOutput, gt_classes: Sequence[Tensor]
    ) -> Dict[str, Tensor]:
        """Return the terms of :func:`mimic_losses`, unweighted.

        Args:
            student, teacher: outputs for the boxes of the T-head, those of all images in order.
            gt_classes: (R_i,) of the boxes of each image, the background is K.
        """
        num_boxes = [len(x) for x in gt_classes]
        limit = max(num_boxes, default=0) if self.num_samples < 0 else self.num_samples
        if self.only_objects:
            rows = positive_rows(torch.cat(list(gt_classes)), num_boxes, limit, self.num_classes)
            student, teacher = student.rows(rows), teacher.rows(rows)
        elif self.num_samples >= 0:
            rows = random_rows(num_boxes, limit, student.logits.device)
            student, teacher = student.rows(rows), teacher.rows(rows)
        return mimic_losses(student, teacher, **self._options)

    def __call__(
        self,
        student: HeadOutput,
        teacher: HeadOutput,
        gt_classes: Sequence[Tensor],
        iteration: int = 0,
    ) -> Dict[str, Tensor]:
        """Return the terms of :meth:`distances` times their factors at ``iteration``."""
        return self.weighted(self.distances(student, teacher, gt_classes), iteration)
