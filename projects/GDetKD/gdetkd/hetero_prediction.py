"""Distillation of a two-stage teacher's predictions into a RetinaNet (Appendix D)."""

from typing import Dict, Mapping, Sequence, Tuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry
from torch import Tensor
from torch.nn import functional as F

from kd_d2.distillation import KeyInfo
from kd_d2.losses.precision import full_precision

from .prediction import PREDICTION_TERMS, PredictionTerm
from .validation import check_softmax, check_weight, choice, preset_weight

__all__ = [
    "HETERO_CLS",
    "BestClassBox",
    "DenseClassification",
    "binary_cross_entropy",
    "dense_terms",
    "max_normalised",
]


def max_normalised(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c P_t log P_s of each row, where P_s = softmax / max(softmax) (Appendix D).

    The softmax is over the logits and a background of logit 0, so that log P_s,c =
    z_c - max(0, max_k z_k). Logits (2, -1, .5) and targets (.6, .1, .2): 0.6. The value is 0
    wherever all logits are equal and not negative: the loss draws towards a tie, not towards the
    teacher's ranking.

    Args:
        logits: (R, K).
        targets: (R, K), the teacher's probabilities of the foreground classes.

    Returns:
        (R,).
    """
    if not len(logits):
        return logits.sum(dim=1)
    highest = logits.amax(dim=1, keepdim=True).clamp(min=0)
    return -(targets * (logits - highest)).sum(dim=1)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of sigma(z_c) against P_t,c, summed over the classes of each row.

    Args, returns: see :func:`max_normalised`. Ours.
    """
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)


HETERO_CLS = Registry("GDETKD_HETERO_CLS")
HETERO_CLS.__doc__ = """
Values of HETERO_PRED.CLS besides "off": functions ``(logits (R, K), targets (R, K)) -> (R,)``.
"""
HETERO_CLS._do_register("max_norm", max_normalised)
HETERO_CLS._do_register("bce", binary_cross_entropy)


class DenseClassification(PredictionTerm):
    """Logits of all sampled boxes against the teacher's softmax, divided by their number."""

    teacher_outputs = ("cls",)

    def __init__(self, mode: str):
        """``mode``: entry of ``HETERO_CLS``."""
        self._loss = HETERO_CLS.get(mode)

    def __call__(self, rois, teacher):
        with torch.autocast(rois.cls.device.type, enabled=False):
            scores = full_precision(teacher["cls"].detach()).softmax(dim=1)[:, : rois.num_classes]
            rows = self._loss(full_precision(rois.cls), scores)
            return rows.sum() / max(len(rows), 1)


class BestClassBox(PredictionTerm):
    """L1 distance of the deltas of foreground boxes to the teacher's box of its best class.

    The teacher refines the student's box, for the foreground class that it believes in most; the
    target are the deltas that make the student's anchor that box. Sum over the 4 deltas, divided
    by the number of foreground boxes. A teacher's box without area has no deltas and is left out.
    """

    teacher_outputs = ("cls", "box")

    def __init__(self, student_weights: Sequence[float], teacher_weights: Sequence[float]):
        """Args: weights of the ``Box2BoxTransform`` of both sides."""
        self._student = Box2BoxTransform(weights=tuple(student_weights))
        self._teacher = Box2BoxTransform(weights=tuple(teacher_weights))

    def __call__(self, rois, teacher):
        with torch.autocast(rois.box.device.type, enabled=False):
            boxes = self.teacher_boxes(rois, teacher)
            chosen = rois.positive & boxes.nonempty()
            target = self._student.get_deltas(rois.anchors[chosen], boxes.tensor[chosen])
            difference = full_precision(rois.box[chosen]) - target
            return difference.abs().sum() / rois.positive.sum().clamp(min=1)

    @torch.no_grad()
    def teacher_boxes(self, rois, teacher: Mapping[str, Tensor]) -> Boxes:
        """Return what the teacher makes of the R boxes."""
        boxes = self._teacher.apply_deltas(teacher["box"], Boxes.cat(rois.boxes).tensor)
        boxes = boxes.unflatten(1, (-1, 4))
        if boxes.shape[1] == 1:
            return Boxes(boxes[:, 0])
        best = teacher["cls"][:, : rois.num_classes].argmax(dim=1)
        return Boxes(boxes[torch.arange(len(best), device=best.device), best])


def dense_terms(
    cfg,
    student_keys: Mapping[str, KeyInfo],
    teacher_keys: Mapping[str, KeyInfo],
    teacher_stages: Sequence[int],
) -> Dict[str, Tuple[PredictionTerm, float]]:
    """Return "cls" and "reg" as far as they are on, each with its weight.

    Args:
        teacher_stages: the teacher's stage that sees the student's boxes, the only entry.

    Raises:
        ValueError: a term that dense students, or this one, do not have.
    """
    node = cfg.KD.GDETKD
    mode = choice("HETERO_PRED.CLS", node.HETERO_PRED.CLS, [n for n, _ in HETERO_CLS] + ["off"])
    regression = choice("HETERO_PRED.REG", node.HETERO_PRED.REG, ("l1", "off")) != "off"
    if mode == "off" and preset_weight("CLS.WEIGHT", node.CLS.WEIGHT, 0.0):
        raise ValueError(
            f"KD.GDETKD.CLS.WEIGHT is {node.CLS.WEIGHT}, but a dense student has no softmax over "
            'the classes: set it to -1.0, or HETERO_PRED.CLS to "max_norm" or "bce"'
        )
    if node.REG.MODE not in ("", "off"):
        raise ValueError(
            f'KD.GDETKD.REG.MODE is "{node.REG.MODE}", which compares the RoI heads of two-stage '
            'detectors, but the student is dense: set it to "off"; HETERO_PRED.REG is for RetinaNet'
        )
    result: Dict[str, Tuple[PredictionTerm, float]] = {}
    cls_weight = preset_weight("CLS.WEIGHT", node.CLS.WEIGHT, 0.0 if mode == "off" else 1.0)
    if cls_weight:
        result["cls"] = (DenseClassification(mode), cls_weight)
    codec = student_keys["codec"].signature
    if result or regression:
        _check_pair(codec[0], student_keys, teacher_keys)
    if regression:
        check_weight("REG.WEIGHT", node.REG.WEIGHT)
        (theirs,) = teacher_keys[f"roi.box[{teacher_stages[0]}]"].signature
        result["reg"] = (BestClassBox(dict(codec[1:])["weights"], theirs), node.REG.WEIGHT)
    return result


def _check_pair(codec: str, student_keys, teacher_keys) -> None:
    if codec != "Box2BoxTransform":
        raise ValueError(
            "KD.GDETKD.HETERO_PRED is supported for RetinaNet only (the paper has no numbers for "
            f"other dense students), but the student's boxes are coded by {codec}; set "
            'HETERO_PRED.CLS and HETERO_PRED.REG to "off"'
        )
    ours, theirs = student_keys["pred.cls"].signature[0], teacher_keys["roi.cls"].channels - 1
    if ours != theirs:
        raise ValueError(
            "KD.GDETKD.HETERO_PRED compares predictions of classes, but the student has "
            f"{ours} (MODEL.RETINANET.NUM_CLASSES) and the teacher {theirs} "
            "(MODEL.ROI_HEADS.NUM_CLASSES); train both on the same classes"
        )
    check_softmax("HETERO_PRED", student_keys, teacher_keys)


PREDICTION_TERMS._do_register("dense", dense_terms)
