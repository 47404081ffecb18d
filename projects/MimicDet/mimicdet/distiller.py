"""Mimicking a two-stage detector with its own backbone instead of the model's T-head (Table 5)."""

import torch
from detectron2.config import configurable

from kd_d2.distillation import DISTILLER_REGISTRY, Distiller, LossSchedule, MethodInfo

from .mimic_loss import MimicLoss
from .variants import head_variant

__all__ = ["MimicDetTeacher"]


@DISTILLER_REGISTRY.register()
class MimicDetTeacher(Distiller):
    """The S-head follows the T-head of a frozen MimicDet, on the student's adjusted boxes.

    Terms ``cls`` and ``reg``, or ``feature`` where heads are not split: eq. 1, with the weight and
    the options of ``MODEL.MIMICDET.MIMIC``. The teacher pools the student's boxes from its own
    pyramid, each from the level that belongs to the one where the box was born.
    """

    info = MethodInfo(
        title="MimicDet with a separate backbone",
        paper="Lu et al., MimicDet: Bridging the Gap Between One-Stage and Two-Stage Object "
        "Detection, ECCV 2020, arXiv 2009.11528",
        compares="class logits and regression features of adjusted boxes, S-head and T-head",
        requires=("MimicDet with S-head", "MimicDet teacher with T-head", "ground truth"),
        gains=(
            "R-50 2x: 39.8 (shared backbone) -> 40.2 (Table 5)",
            "R-101 2x: 41.8 (shared backbone) -> 42.2 (Table 5)",
        ),
        unverified="There is no official code; where the paper is silent, choices are ours.",
    )

    @configurable
    def __init__(self, *, loss: MimicLoss, split: bool = True):
        """
        Args:
            loss: with the factors of the terms; its schedule is not used.
            split: whether the heads have a feature vector for each branch.
        """
        names = ("cls", "reg") if split else ("feature",)
        factors = loss.weights([f"loss_mimic_{name}" for name in names])
        super().__init__(
            weights=dict(zip(names, factors.values())),
            student_needs={"head.s", "path:head", "path:sampler"},
            teacher_needs={"head.t", "path:backbone"},
        )
        self.loss = loss

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        """
        Raises:
            ValueError: ``TEACHER.MODE`` is "shared".
        """
        node = cfg.MODEL.MIMICDET
        if node.TEACHER.MODE != "separate":
            raise ValueError(
                "KD.DISTILLERS names MimicDetTeacher, but MODEL.MIMICDET.TEACHER.MODE is "
                f"'{node.TEACHER.MODE}', with which the T-head of the model itself teaches: set it "
                "to 'separate'"
            )
        return {
            "loss": MimicLoss(**{**MimicLoss.from_config(cfg), "schedule": LossSchedule()}),
            "split": head_variant(cfg).split,
        }

    def validate(self, student_keys, teacher_keys):
        """
        Raises:
            ValueError: a network is no MimicDet with the head that is needed, or the heads have
                other widths, classes, branches or levels.
        """
        super().validate(student_keys, teacher_keys)
        ours, theirs = student_keys["head.s"], teacher_keys["head.t"]
        if ours != theirs:
            raise ValueError(
                "MimicDetTeacher compares S-head and T-head box by box, but (width, strides, "
                "(classes, branches)) differ: student "
                f"{(ours.channels, ours.strides, ours.signature)}, teacher "
                f"{(theirs.channels, theirs.strides, theirs.signature)}. Give both the same "
                "MODEL.ROI_HEADS.NUM_CLASSES, MODEL.RPN.IN_FEATURES and T_HEAD.VARIANT, and "
                "S_HEAD.FEAT_DIM the teacher's MODEL.ROI_BOX_HEAD.FC_DIM"
            )

    def compute(self, ctx):
        (boxes,) = ctx.student["path:sampler"]
        (aligned,) = ctx.student["path:head"]
        student = ctx.student["head.s"].predict(aligned, boxes)
        (features,) = ctx.teacher["path:backbone"]
        t_head = ctx.teacher["head.t"]
        with torch.no_grad():
            teacher = t_head.features([features[name] for name in t_head.in_features], boxes)
        terms = self.loss.distances(student, teacher, [x.gt_classes for x in boxes])
        return {name.replace("loss_mimic_", ""): value for name, value in terms.items()}
