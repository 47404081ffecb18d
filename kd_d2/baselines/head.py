"""HEAD: a two-stage teacher helps a one-stage student through an assistant head."""

from typing import List, Mapping, Sequence

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import StandardROIHeads, build_roi_heads
from detectron2.structures import Instances
from torch import nn

from kd_d2.blocks import DenseProposals, at_anchors
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import (
    DISTILLER_REGISTRY,
    DetectorTeacher,
    Distiller,
    Key,
    LossSchedule,
    MethodInfo,
    sigmoid_classes,
)
from kd_d2.losses.precision import full_precision

from .options import choice

__all__ = ["HEAD", "add_head_config"]

_TERMS = ("assist", "akd", "ckd")


@CONFIG_NODES.register()
def add_head_config(cfg: CN) -> None:
    """Add ``KD.HEAD``."""
    cfg.KD.HEAD = node = CN()
    # "assist": detection losses of the assistant; "akd": its hidden layers imitate the teacher's;
    # "ckd": so do the features of the student's classification tower. The assistant is always
    # there; without "assist" only the other terms train it.
    node.TERMS = _TERMS
    # Weight of the assistant's own detection losses.
    node.ASSIST_WEIGHT = 1.0
    # Weights of the imitation, per layer. Official: 2.
    node.AKD_WEIGHT = 2.0
    node.CKD_WEIGHT = 2.0
    # The weights of the imitation grow linearly from 0 over so many iterations. Official: 2000.
    # (KD.HEAD.SCHEDULE would hold for the detection losses, too.)
    node.WARMUP_ITERS = 2000
    # Boxes of the student per image that the assistant samples from, candidates before
    # suppression, and its IoU. Official: 1000, 2000, 0.7.
    node.NUM_BOXES = 1000
    node.CANDIDATES = 2000
    node.NMS = 0.7
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class HEAD(Distiller):
    """An assistant with the shape of the teacher's RoI head learns on the student's pyramid.

    It starts with the teacher's weights, reads as many levels of the student as the teacher's RoI
    head has (P3-P6 for P2-P5), is trained by its own detection losses on boxes of the student, and
    is not part of the student. ``fc1``, ``fc2``, ...: mean squared difference between its hidden
    layers, behind a linear layer each, and the teacher's on the same boxes. ``ckd``: the same
    between the student's last classification feature at the anchor that a box comes from, behind a
    linear layer, and the teacher's last hidden layer; ground-truth boxes have no anchor and are
    left out. All features are taken behind their ReLU, as in the official code.

    The authors train with learning rate 0.01, gradient clipping at norm 20 and short edges of 640
    to 800 pixels.
    """

    copies_teacher = True

    info = MethodInfo(
        title="HEAD: hetero-assists distillation",
        paper="Wang et al., HEAD: HEtero-Assists Distillation for Heterogeneous Object Detectors, "
        "ECCV 2022; https://github.com/LutingWang/HEAD",
        compares="hidden layers of an assistant RoI head and of the teacher's, class features",
        requires=(
            "one-stage student, two-stage teacher",
            "equal channels of the pyramids",
            "ground truth",
        ),
        gains=(
            "Faster R-CNN R-50 -> RetinaNet R-18: 31.7 -> assist 33.4 -> akd 35.7 -> ckd 36.1 "
            "(HEAD's paper)",
            "Faster R-CNN R-50 -> RetinaNet MobileNetV2: 27.8 -> 28.9 -> 32.2 -> 33.1",
        ),
    )

    @configurable
    def __init__(
        self,
        *,
        assistant: StandardROIHeads,
        class_key: str,
        class_channels: int,
        anchors_per_cell: int,
        proposals: DenseProposals,
        terms: Sequence[str] = _TERMS,
        assist_weight: float = 1.0,
        akd_weight: float = 2.0,
        ckd_weight: float = 2.0,
        warmup_iters: int = 2000,
    ):
        """
        Args:
            assistant: reads features "0", "1", ... of the student's pyramid; its box head has fully
                connected layers.
            class_key: key of the student's last classification feature.
            class_channels: its width.
            anchors_per_cell: of the student.
            proposals: bound to the two networks.
            terms, assist_weight, akd_weight, ckd_weight, warmup_iters: see
                :func:`add_head_config`.

        Raises:
            ValueError: an unknown term, or none.
        """
        if not terms:
            raise ValueError(f"KD.HEAD.TERMS is empty; name some of {_TERMS}")
        for name in terms:
            choice("KD.HEAD.TERMS", name, _TERMS)
        widths = [fc.out_features for fc in assistant.box_head.fcs]
        layers = [f"fc{i}" for i in range(1, len(widths) + 1)] if "akd" in terms else []
        weights = {name: akd_weight for name in layers}
        if "assist" in terms:
            weights.update(det_cls=assist_weight, det_box=assist_weight)
        if "ckd" in terms:
            weights["ckd"] = ckd_weight
        super().__init__(
            weights=weights,
            student_needs=("neck", class_key, *proposals.student_needs),
            teacher_needs=("roi.feat",),
        )
        self.assistant = assistant
        self.adapters = nn.ModuleDict({n: nn.Linear(w, w) for n, w in zip(layers, widths)})
        if "ckd" in terms:
            self.adapters["ckd"] = nn.Linear(class_channels, widths[-1])
        self._proposals = proposals
        self._class_key, self._anchors_per_cell = class_key, anchors_per_cell
        self._warmup = LossSchedule(warmup_iters=warmup_iters)

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node = cls.config_node(cfg)
        _check_pair(student_keys, teacher_keys)
        proposals = DenseProposals(node.NUM_BOXES, node.CANDIDATES, node.NMS)
        proposals.bind(student_keys, teacher_keys)
        keys = [k for k in student_keys if k.startswith("head.cls[") and not k.endswith(":pre")]
        class_key = max(keys, key=lambda k: Key.parse(k).index)
        info = student_keys["pred.cls"]
        fields = ("TERMS", "ASSIST_WEIGHT", "AKD_WEIGHT", "CKD_WEIGHT", "WARMUP_ITERS")
        return {
            "assistant": _build_assistant(DetectorTeacher.load_config(cfg), student_keys),
            "class_key": class_key,
            "class_channels": student_keys[class_key].channels,
            "anchors_per_cell": info.channels // info.signature[0],
            "proposals": proposals,
            **{field.lower(): node[field] for field in fields},
        }

    @torch.no_grad()
    def load_teacher_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy the teacher's box head and predictor.

        Raises:
            ValueError: the teacher has another RoI head than its config says.
        """
        prefix = "roi_heads."
        for name, value in self.assistant.state_dict(keep_vars=True).items():
            theirs = state.get(prefix + name)
            if theirs is None or theirs.shape != value.shape:
                found = "nothing" if theirs is None else tuple(theirs.shape)
                raise ValueError(
                    f"HEAD: '{prefix}{name}' has shape {tuple(value.shape)} in the assistant, in "
                    f"the teacher: {found}; KD.TEACHER.CONFIG_FILE must be the teacher's"
                )
            value.copy_(theirs)

    def forward(self, ctx):
        """Terms of the imitation are warmed up, the detection losses are not."""
        factor = self._warmup(ctx.iteration)
        return {
            name: value if name.startswith("det_") else factor * value
            for name, value in super().forward(ctx).items()
        }

    def compute(self, ctx):
        heads = self.assistant
        proposals = self._sample(ctx)
        boxes = [p.proposal_boxes for p in proposals]
        levels = [full_precision(x) for x in ctx.student["neck"][: len(heads.box_in_features)]]
        hidden = _hidden_layers(heads.box_head, heads.box_pooler(levels, boxes))
        terms = {}
        if "det_cls" in self.weights:
            predictions = [x.float() for x in heads.box_predictor(hidden[-1])]
            losses = heads.box_predictor.losses(predictions, proposals)
            terms.update(det_cls=losses["loss_cls"], det_box=losses["loss_box_reg"])
        with torch.no_grad():
            pooled = ctx.teacher.run(["roi.feat"], boxes)["roi.feat"]
            targets = _hidden_layers(ctx.teacher.model.roi_heads.box_head, pooled)
        for i, (ours, theirs) in enumerate(zip(hidden, targets), start=1):
            if f"fc{i}" in self.weights:
                terms[f"fc{i}"] = _mean_squared(self.adapters[f"fc{i}"](ours), theirs)
        if "ckd" in self.weights:
            terms["ckd"] = self._class_term(ctx, proposals, targets[-1])
        return terms

    @torch.no_grad()
    def _sample(self, ctx) -> List[Instances]:
        """The student's boxes and the ground truth, sampled and labelled as in a RoI head."""
        targets = []
        for gt in ctx.gt_instances:
            gt = Instances(gt.image_size, gt_boxes=gt.gt_boxes, gt_classes=gt.gt_classes)
            gt.anchor = torch.full_like(gt.gt_classes, -1)
            targets.append(gt)
        return self.assistant.label_and_sample_proposals(self._proposals.instances(ctx), targets)

    def _class_term(self, ctx, proposals, targets) -> torch.Tensor:
        anchors = torch.cat([p.anchor for p in proposals])
        images = torch.cat([torch.full_like(p.anchor, i) for i, p in enumerate(proposals)])
        known = anchors >= 0
        levels = ctx.student[self._class_key]
        features = at_anchors(levels, self._anchors_per_cell, images[known], anchors[known])
        return _mean_squared(self.adapters["ckd"](features), targets[known])


def _mean_squared(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    difference = ours.float() - theirs.float()
    return difference.square().sum() / max(difference.numel(), 1)


def _hidden_layers(box_head: nn.Sequential, pooled: torch.Tensor) -> List[torch.Tensor]:
    """Outputs of the fully connected layers behind their ReLU."""
    result = []
    for name, module in box_head.named_children():
        pooled = module(pooled)
        if name.startswith("fc_relu"):
            result.append(pooled)
    return result


def _check_pair(student_keys, teacher_keys) -> None:
    if "pred.cls" not in student_keys:
        raise ValueError(
            "HEAD needs a one-stage student (GFL, RetinaNet, FCOS, ATSS), because its assistant is "
            "a second stage; for a two-stage student use e.g. RoIImitation or PKD"
        )
    if "roi.cls" not in teacher_keys or "roi.cls[1]" in teacher_keys:
        raise ValueError(
            "HEAD needs a teacher with one RoI head (Faster R-CNN); for one-stage teachers HEAD is "
            "FitNets, for cascades there is no counterpart of their later stages"
        )
    ours, theirs = student_keys["neck"], teacher_keys["neck"]
    if ours.channels != theirs.channels:
        raise ValueError(
            f"HEAD's assistant is a copy of the teacher's RoI head, which reads {theirs.channels} "
            f"channels, but 'neck' of the student has {ours.channels}; set MODEL.FPN.OUT_CHANNELS "
            "alike"
        )
    if len(ours.strides) < len(theirs.strides):
        raise ValueError(
            f"HEAD's assistant needs {len(theirs.strides)} levels, 'neck' of the student has "
            f"{len(ours.strides)} (strides {ours.strides})"
        )
    classes = sigmoid_classes("HEAD", "student", student_keys), teacher_keys["roi.cls"].channels - 1
    if classes[0] != classes[1]:
        raise ValueError(
            f"HEAD: the student has {classes[0]} classes, the teacher's 'roi.cls' {classes[1]}; "
            "train both on the same classes (NUM_CLASSES)"
        )


def _build_assistant(teacher_cfg: CN, student_keys) -> StandardROIHeads:
    cfg = teacher_cfg.clone()
    cfg.defrost()
    neck = student_keys["neck"]
    strides = neck.strides[: len(cfg.MODEL.ROI_HEADS.IN_FEATURES)]
    shapes = {str(i): ShapeSpec(neck.channels, stride=s) for i, s in enumerate(strides)}
    cfg.MODEL.ROI_HEADS.IN_FEATURES = list(shapes)
    cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = True
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
    name = cfg.MODEL.ROI_HEADS.NAME
    if name == "StandardROIHeads":
        heads = build_roi_heads(cfg, shapes)
        if getattr(heads.box_head, "fcs", None):
            return heads
    raise ValueError(
        "HEAD needs a teacher with MODEL.ROI_HEADS.NAME 'StandardROIHeads' whose "
        f"MODEL.ROI_BOX_HEAD has fully connected layers (NUM_FC >= 1), got '{name}' with "
        f"'{cfg.MODEL.ROI_BOX_HEAD.NAME}' and NUM_FC {cfg.MODEL.ROI_BOX_HEAD.NUM_FC}"
    )
