"""Distillation of a two-stage detector on the boxes that the student sampled (Sec. 3.2)."""

from typing import Dict, List, Mapping, Sequence

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from kd_d2.config import choice
from kd_d2.distillation import DISTILLER_REGISTRY, DistillationContext, Distiller, MethodInfo
from kd_d2.losses.box import (
    class_aware_localisation,
    convert_deltas,
    labelled_class_localisation,
)
from kd_d2.losses.precision import full_precision
from kd_d2.losses.soft_targets import soft_cross_entropy

from .distiller_checks import check_pair, check_weights

__all__ = ["JointDetNAS", "SlicedAdapter"]

_REG_MODES = ("class_aware", "gt_class")
_ROIS = ("positive", "all")


class SlicedAdapter(nn.Conv2d):
    """f_adap: a 3x3 conv whose leading inputs and outputs are used (A.2).

    It is as wide as the widest neck of the pool, so that its weights survive a change of the
    teacher, and of an elastic student. With one output of the paper's 256 channels no teacher of
    another width could be imitated; hence the width is ours.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)
        weight_init.c2_xavier_fill(self)

    def forward(self, x: Tensor, out_channels: int) -> Tensor:
        """
        Args:
            x: (R, C, h, w), C at most the widest student.
            out_channels: C_t.

        Returns:
            (R, C_t, h, w).
        """
        weight = self.weight[:out_channels, : x.shape[1]]
        return F.conv2d(x, weight, self.bias[:out_channels], padding=1)


@DISTILLER_REGISTRY.register()
class JointDetNAS(Distiller):
    """L_feat + L_cls + L_reg of Joint-DetNAS; the teacher sees the student's boxes.

    feat: mean squared difference of adapted RoI features, each side pooled by its own pooler. The
    paper's sum over the channels would outweigh the detection losses by far; its divisor counts
    positions only, ours channels, too. cls: soft cross entropy over all classes and background.
    reg: class-aware distance of the deltas. cls and reg are means over all sampled RoIs.
    """

    info = MethodInfo(
        title="Joint-DetNAS: detection distillation",
        paper="Yao et al., Joint-DetNAS: Upgrade Your Detector with NAS, Pruning and Dynamic "
        "Distillation, CVPR 2021, arXiv 2105.12971",
        compares="features and predictions of the boxes that the student sampled",
        requires=("two-stage student and teacher without cascade", "equal classes", "ground truth"),
        gains=(
            "Faster R-CNN R-50 -> R-18, 2x: 36.0 -> 38.1 (Table 3)",
            "Faster R-CNN R-101 -> R-50, 2x: 39.5 -> 41.6 (Table 3)",
            "Faster R-CNN R-50 -> R-18, 1x: 34.0 -> 37.9 (Table 12)",
        ),
        unverified="no official code is public: divisor of feat, its RoIs and the width of the "
        "adapter are ours (config.py marks each)",
    )

    @configurable
    def __init__(
        self,
        *,
        weights: Mapping[str, float],
        student_channels: int,
        adapter_channels: int,
        num_classes: int,
        student_box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        teacher_box_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        rois: str = "positive",
        reg_mode: str = "class_aware",
    ):
        """
        Args:
            weights: of the terms that are on, of "feat", "cls", "reg".
            student_channels: width of the student's pyramid, the widest if it is elastic.
            adapter_channels: width of the widest teacher's.
            num_classes: K.
            student_box_weights, teacher_box_weights: of ``Box2BoxTransform``.
            rois: "positive" or "all": what ``feat`` compares.
            reg_mode: "class_aware" or "gt_class".

        Raises:
            ValueError: an unknown name.
        """
        choice("KD.JOINTDETNAS.FEAT.ROIS", rois, _ROIS)
        choice("KD.JOINTDETNAS.REG.MODE", reg_mode, _REG_MODES)
        keys = {"feat": ("roi.feat",), "cls": ("roi.cls",), "reg": ("roi.cls", "roi.box")}
        needs = sorted({key for term in weights for key in keys[term]})
        super().__init__(weights=weights, student_needs={"proposals", *needs}, teacher_needs=needs)
        self.adapter = (
            SlicedAdapter(student_channels, adapter_channels) if "feat" in weights else None
        )
        self._needs = needs
        self._all_rois, self._labelled = rois == "all", reg_mode == "gt_class"
        self._num_classes = num_classes
        self._box_weights = tuple(teacher_box_weights), tuple(student_box_weights)

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node = cls.config_node(cfg)
        weights = check_weights(node)
        check_pair(cfg, weights, student_keys, teacher_keys)
        return {
            "weights": weights,
            "student_channels": student_keys["roi.feat"].channels,
            "adapter_channels": node.FEAT.ADAPTER_CHANNELS or teacher_keys["roi.feat"].channels,
            "num_classes": student_keys["roi.cls"].channels - 1,
            "student_box_weights": student_keys["roi.box"].signature[0],
            "teacher_box_weights": teacher_keys["roi.box"].signature[0],
            "rois": node.FEAT.ROIS,
            "reg_mode": node.REG.MODE,
        }

    def compute(self, ctx: DistillationContext) -> Dict[str, Tensor]:
        proposals = ctx.student["proposals"]
        boxes: List[Boxes] = [Boxes(p.proposal_boxes.tensor.detach()) for p in proposals]
        classes = torch.cat([p.gt_classes for p in proposals])
        positive = (classes >= 0) & (classes < self._num_classes)
        student = {key: ctx.student[key] for key in self._needs}
        teacher = ctx.teacher.run(self._needs, boxes)
        get_event_storage().put_scalar(f"{self.label}/num_positive", positive.sum().item())
        terms = {"feat": self._feat, "cls": self._cls, "reg": self._reg}
        return {name: terms[name](student, teacher, classes, positive) for name in self.weights}

    def _feat(self, student, teacher, classes, positive) -> Tensor:
        ours, theirs = student["roi.feat"], teacher["roi.feat"].detach()
        if not self._all_rois:
            ours, theirs = ours[positive], theirs[positive]
        if theirs.shape[1] > self.adapter.out_channels:
            raise ValueError(
                f"the teacher's pyramid has {theirs.shape[1]} channels, more than "
                f"KD.JOINTDETNAS.FEAT.ADAPTER_CHANNELS {self.adapter.out_channels}"
            )
        ours = self.adapter(ours, theirs.shape[1])
        with torch.autocast(ours.device.type, enabled=False):
            difference = full_precision(ours) - full_precision(theirs)
            return difference.square().sum() / max(difference.numel(), 1)

    def _cls(self, student, teacher, classes, positive) -> Tensor:
        rows = soft_cross_entropy(student["roi.cls"], teacher["roi.cls"])
        return rows.sum() / max(len(rows), 1)

    def _reg(self, student, teacher, classes, positive) -> Tensor:
        number = max(len(classes), 1)
        with torch.autocast(classes.device.type, enabled=False):
            ours = self._by_class(student["roi.box"])
            theirs = convert_deltas(self._by_class(teacher["roi.box"]), *self._box_weights)
            if self._labelled:
                rows = labelled_class_localisation(
                    ours[positive], theirs[positive], classes[positive]
                )
            else:
                scores = full_precision(teacher["roi.cls"]).softmax(dim=1)
                rows = class_aware_localisation(ours, theirs, scores[:, : self._num_classes])
            return rows.sum() / number

    def _by_class(self, deltas: Tensor) -> Tensor:
        """(R, 4K) -> (R, K, 4), also for R = 0."""
        return deltas.view(len(deltas), self._num_classes, 4)
