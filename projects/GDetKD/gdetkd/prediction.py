"""Distillation of class logits and box deltas on the same RoIs (Sec. 3.4)."""

from typing import Dict, Mapping, Sequence, Tuple

import torch
from detectron2.utils.registry import Registry
from torch import Tensor

from kd_d2.distillation import KeyInfo
from kd_d2.losses.box import (
    class_aware_localisation,
    convert_deltas,
    labelled_class_localisation,
)
from kd_d2.losses.precision import full_precision
from kd_d2.losses.soft_targets import soft_cross_entropy

from .records import RoIBatch
from .validation import (
    check_same_classes,
    check_softmax,
    check_weight,
    choice,
    is_agnostic,
    preset_weight,
)

__all__ = [
    "PREDICTION_TERMS",
    "REG_MODES",
    "PredictionTerm",
    "Regression",
    "SoftCrossEntropy",
    "two_stage_terms",
]


class PredictionTerm:
    """Interface of the terms on the outputs of the head, for one stage of the student.

    Attributes:
        teacher_outputs: what is read of the teacher, of "cls" and "box".
    """

    teacher_outputs: Tuple[str, ...] = ()

    def __call__(self, rois: RoIBatch, teacher: Mapping[str, Tensor]) -> Tensor:
        """Return the unweighted fp32 scalar; ``teacher``: its outputs for the boxes of ``rois``."""
        raise NotImplementedError


class SoftCrossEntropy(PredictionTerm):
    """Mean of :func:`soft_cross_entropy` over all sampled RoIs, C + 1 classes (Sec. 3.4)."""

    teacher_outputs = ("cls",)

    def __call__(self, rois, teacher):
        rows = soft_cross_entropy(rois.cls, teacher["cls"])
        return rows.sum() / max(len(rows), 1)


REG_MODES = Registry("GDETKD_REG_MODES")
REG_MODES.__doc__ = """
Regression terms, classes with ``check(student_agnostic, teacher_agnostic)``, which raises where
the mode does not fit the heads, and ``rows(rois, student, teacher, scores) -> (R,)``: distance of
deltas (R, K or 1, 4) given the teacher's foreground probabilities (R, K).
"""


class _ClassAware:
    """Eq. 3: deltas of all classes, weighted with the teacher's probabilities."""

    def check(self, student_agnostic: bool, teacher_agnostic: bool) -> None:
        sides = {"student": student_agnostic, "teacher": teacher_agnostic}
        agnostic = " and ".join(side for side, yes in sides.items() if yes)
        if agnostic:
            raise ValueError(
                'KD.GDETKD.REG.MODE is "caware", which compares deltas of every class, but '
                f"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is True for the {agnostic} (cascades "
                'are always class-agnostic); set REG.MODE to "fg_weighted"'
            )

    def rows(self, rois, student, teacher, scores):
        return class_aware_localisation(student, teacher, scores)


class _ForegroundWeighted(_ClassAware):
    """What eq. 3 becomes where a head predicts one box for all classes: (1 - p_bg) ||d^t - d^s||_1
    if both do."""

    def check(self, student_agnostic, teacher_agnostic):
        if not (student_agnostic or teacher_agnostic):
            raise ValueError(
                'KD.GDETKD.REG.MODE is "fg_weighted", but MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG '
                'is False for student and teacher; set REG.MODE to "caware"'
            )


class _GTClass:
    """Table 13 "N": foreground RoIs, deltas of the class of their ground truth."""

    def check(self, student_agnostic, teacher_agnostic):
        """Any heads will do."""

    def rows(self, rois, student, teacher, scores):
        positive = rois.positive
        return labelled_class_localisation(
            student[positive], teacher[positive], rois.gt_classes[positive]
        )


def _by_class(deltas: Tensor) -> Tensor:
    """(R, 4K or 4) -> (R, K or 1, 4), also for R = 0."""
    return deltas.view(len(deltas), deltas.shape[1] // 4, 4)


REG_MODES._do_register("caware", _ClassAware)
REG_MODES._do_register("fg_weighted", _ForegroundWeighted)
REG_MODES._do_register("gt_class", _GTClass)


class Regression(PredictionTerm):
    """Distance of the deltas of all sampled RoIs, sum over the 4 deltas, divided by the number of
    sampled RoIs like Detectron2's box loss."""

    teacher_outputs = ("cls", "box")

    def __init__(
        self, mode: str, student_weights: Sequence[Sequence[float]], teacher_weights: Sequence
    ):
        """
        Args:
            mode: entry of ``REG_MODES``.
            student_weights: weights of the student's ``Box2BoxTransform``, by stage.
            teacher_weights: those of the teacher's stage that each of them is compared with.
        """
        self.mode = REG_MODES.get(mode)()
        self._weights = tuple(zip(teacher_weights, student_weights))

    def __call__(self, rois, teacher):
        with torch.autocast(rois.box.device.type, enabled=False):
            student = _by_class(full_precision(rois.box))
            target = convert_deltas(_by_class(teacher["box"]), *self._weights[rois.stage])
            scores = full_precision(teacher["cls"]).softmax(dim=1)[:, : rois.num_classes]
            rows = self.mode.rows(rois, student, target, scores)
            return rows.sum() / max(len(rois.box), 1)


PREDICTION_TERMS = Registry("GDETKD_PREDICTION_TERMS")
PREDICTION_TERMS.__doc__ = """
By family of students: functions ``(cfg, student_keys, teacher_keys, teacher_stages)`` that return
the prediction terms that are on, name -> (term, weight).
"""


def two_stage_terms(
    cfg,
    student_keys: Mapping[str, KeyInfo],
    teacher_keys: Mapping[str, KeyInfo],
    teacher_stages: Sequence[int],
) -> Dict[str, Tuple[PredictionTerm, float]]:
    """Return "cls" and "reg" as far as they are on, each with its weight.

    Args:
        teacher_stages: stage of the teacher that each of the student's is compared with.

    Raises:
        ValueError: an unknown mode, or heads that cannot be compared.
    """
    node = cfg.KD.GDETKD
    agnostic = is_agnostic(student_keys), is_agnostic(teacher_keys)
    mode = node.REG.MODE or ("fg_weighted" if any(agnostic) else "caware")
    choice("REG.MODE", mode, [name for name, _ in REG_MODES] + ["off"])
    for key in ("CLS", "REG"):
        if node.HETERO_PRED[key] != "off":
            raise ValueError(
                f'KD.GDETKD.HETERO_PRED.{key} is "{node.HETERO_PRED[key]}", but the student has '
                f'two stages: set it to "off", and use KD.GDETKD.{key}'
            )
    cls_weight = preset_weight("CLS.WEIGHT", node.CLS.WEIGHT, 1.0)
    if cls_weight or mode != "off":
        check_same_classes("CLS.WEIGHT and REG.MODE", student_keys, teacher_keys)
        check_softmax("CLS.WEIGHT and REG.MODE", student_keys, teacher_keys)
    result: Dict[str, Tuple[PredictionTerm, float]] = {}
    if cls_weight:
        result["cls"] = (SoftCrossEntropy(), cls_weight)
    if mode != "off":
        # with one class there is no difference
        if student_keys["roi.cls"].channels > 2:
            REG_MODES.get(mode)().check(*agnostic)
        check_weight("REG.WEIGHT", node.REG.WEIGHT)
        own = [student_keys[f"roi.box[{k}]"].signature[0] for k in range(len(teacher_stages))]
        theirs = [teacher_keys[f"roi.box[{k}]"].signature[0] for k in teacher_stages]
        result["reg"] = (Regression(mode, own, theirs), node.REG.WEIGHT)
    return result


PREDICTION_TERMS._do_register("two_stage", two_stage_terms)
