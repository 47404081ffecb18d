"""The CrossKD distiller."""

from typing import Dict, List, Mapping, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch.nn import functional as F

from kd_d2.distillation import DISTILLER_REGISTRY, Distiller, MethodInfo
from kd_d2.losses.imitation import align_statistics

from .compatibility import check_pair, num_tower_stages
from .losses import CLS_LOSSES, REG_LOSSES, centerness_loss
from .normalisers import NORMALISERS
from .options import choice, option
from .presets import Preset, preset_from_config
from .regions import CLS_REGIONS, REG_REGIONS, Positions
from .strategies import STRATEGIES

__all__ = ["CrossKD"]

# config name of a branch -> the taps' name
_BRANCHES = {"cls": "cls", "reg": "box"}


@DISTILLER_REGISTRY.register()
class CrossKD(Distiller):
    """Distils predictions that student features make in the teacher's head.

    For tower stage i, p^s_cross = T_{>i}(A(f_i^s; f_i^t)); the loss compares it with the teacher's
    own prediction p^t, so that the student's head is not torn between ground truth and teacher
    (Sec. 3.2, eq. 3 to 5). Gradients cross the frozen teacher layers and reach only the student's
    stages <= i, its pyramid and its backbone.

    Terms: ``cls``, ``reg`` and, for detectors whose preset has it, ``ctr``; prefixed ``mimic_``
    for the mode "mimic" when both modes are on.
    """

    info = MethodInfo(
        title="CrossKD: cross-head knowledge distillation",
        paper="Wang et al., CrossKD: Cross-Head Knowledge Distillation for Dense Object Detection, "
        "arXiv 2306.11369",
        compares="predictions of student features in the teacher's head with the teacher's own",
        requires=(
            "dense detectors of one kind",
            "equal head towers (stages, channels), strides, classes, anchors and box coder",
            "ground truth",
        ),
        gains=(
            "GFL R-101 -> R-50: 40.2 -> 43.7, with PKD 43.9 (CrossKD's Table 7)",
            "GFL R-50 -> R-18: 35.8 -> 38.7 (Table 1)",
            "RetinaNet R-101 -> R-50: 37.4 -> 39.7 (Table 8)",
            "FCOS R-101 -> R-50: 38.5 -> 41.3 (Table 8)",
            "ATSS R-101 -> R-50: 39.4 -> 41.8 (Table 8)",
        ),
    )

    @configurable
    def __init__(
        self,
        *,
        preset: Preset,
        positions: Mapping[str, int],
        num_stages: Mapping[str, int],
        centerness_branch: str = "none",
        modes: Sequence[str] = ("cross",),
        strategy: str = "a",
        tap: str = "post_act",
        align: str = "official",
        cls_loss: str = "qfl",
        cls_gamma: float = 1.0,
        cls_region: str = "all",
        reg_tau: float = 1.0,
        detach_target: bool = True,
    ):
        """
        Args:
            preset: losses, weights, normalisers, region of the regression.
            positions: branch ("cls", "reg") -> i; its keys are the distilled branches.
            num_stages: branch -> number of tower stages of both networks.
            centerness_branch: branch that predicts the centerness, or "none".
            modes: "cross" and/or "mimic".
            strategy: key of ``STRATEGIES``.
            tap: "post_act" or "pre_act".
            align: "official" or "none".
            cls_loss, cls_gamma, cls_region, reg_tau, detach_target: see :mod:`.config`.

        Raises:
            ValueError: a name that does not exist, a position outside 0..stages + 1, a number out
                of its range, or a weight for a centerness that the detector does not have.
        """
        self.preset = preset
        self.strategy = STRATEGIES[choice("STRATEGY", strategy, STRATEGIES)]
        self.modes = tuple(choice("MODES", mode, ("cross", "mimic")) for mode in modes)
        if not self.modes or not positions:
            raise ValueError("KD.CROSSKD.MODES and KD.CROSSKD.BRANCHES must not be empty")
        if len(set(self.modes)) < len(self.modes):
            raise ValueError(f"KD.CROSSKD.MODES lists a mode twice: {self.modes}")
        self.before_activation = choice("TAP", tap, ("post_act", "pre_act")) == "pre_act"
        self.aligned = choice("ALIGN", align, ("official", "none")) == "official"
        self.cls_loss = CLS_LOSSES[choice("CLS_LOSS", cls_loss, CLS_LOSSES)]
        self.cls_region = CLS_REGIONS[choice("CLS_REGION", cls_region, CLS_REGIONS)]
        self.reg_loss = REG_LOSSES[choice("REG_LOSS", preset.reg_loss, REG_LOSSES)]
        self.reg_region = REG_REGIONS[choice("REG_REGION", preset.reg_region, REG_REGIONS)]
        if cls_gamma != 0 and not cls_gamma >= 1:
            raise ValueError(f"KD.CROSSKD.CLS_GAMMA must be 0 or at least 1, got {cls_gamma}")
        if not reg_tau > 0:
            raise ValueError(f"KD.CROSSKD.REG_TAU must be positive, got {reg_tau}")
        self.cls_gamma, self.reg_tau = cls_gamma, reg_tau
        self.detach_target = detach_target
        self.positions = dict(positions)
        self.num_stages = dict(num_stages)
        for branch, position in self.positions.items():
            choice("BRANCHES", branch, _BRANCHES)
            if not 0 <= position <= num_stages[branch] + 1:
                raise ValueError(
                    f"KD.CROSSKD.POSITION of branch '{branch}' must lie in "
                    f"0..{num_stages[branch] + 1} ({num_stages[branch]} tower stages; one more "
                    f"is prediction mimicking), got {position}"
                )
        if preset.ctr_weight and centerness_branch == "none":
            raise ValueError(
                f"KD.CROSSKD.CTR_WEIGHT is {preset.ctr_weight}, but the student predicts no "
                "centerness; set it to 0"
            )
        # what each branch predicts, of what has a loss: "cls", "box", "ctr"
        self._outputs = {b: [_BRANCHES[b]] for b in self.positions}
        if preset.ctr_weight and centerness_branch in self._outputs:
            self._outputs[centerness_branch].append("ctr")
        super().__init__(
            weights=self._weights(),
            student_needs=self._student_needs(),
            teacher_needs=self._teacher_needs(),
        )

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node = cls.config_node(cfg)
        preset = preset_from_config(node, cfg.MODEL)
        for branch in node.BRANCHES:
            choice("BRANCHES", branch, _BRANCHES)
        if "pred.cls" not in student_keys or "pred.cls" not in teacher_keys:
            raise ValueError(
                "CrossKD needs a dense detector with towers (e.g. GFL, RetinaNet, FCOS, ATSS) as "
                "student and as teacher"
            )
        ctr = student_keys["pred.ctr"].signature[0] if "pred.ctr" in student_keys else "none"
        num_stages = {b: num_tower_stages(student_keys, tap) for b, tap in _BRANCHES.items()}
        return {
            "preset": preset,
            "positions": _positions(node, preset, num_stages),
            "num_stages": num_stages,
            "centerness_branch": {v: k for k, v in _BRANCHES.items()}.get(ctr, "none"),
            "modes": node.MODES,
            "strategy": node.STRATEGY,
            "tap": node.TAP,
            "align": node.ALIGN,
            "cls_loss": node.CLS_LOSS,
            "cls_gamma": node.CLS_GAMMA,
            "cls_region": node.CLS_REGION,
            "reg_tau": node.REG_TAU,
            "detach_target": node.DETACH_TARGET,
        }

    # ------------------------------------------------------------------------ declarations
    def _crosses(self, branch: str) -> bool:
        return self.positions[branch] <= self.num_stages[branch]

    def _prefix(self, mode: str) -> str:
        return "mimic_" if mode == "mimic" and len(self.modes) > 1 else ""

    def _weights(self) -> Dict[str, float]:
        factors = {
            "cls": ("cls", self.preset.cls_weight),
            "box": ("reg", self.preset.reg_weight),
            "ctr": ("ctr", self.preset.ctr_weight),
        }
        result = {}
        for mode in self.modes:
            for outputs in self._outputs.values():
                for output in outputs:
                    name, weight = factors[output]
                    result[self._prefix(mode) + name] = weight
        return result

    def _tap_key(self, branch: str) -> str:
        position = self.positions[branch]
        suffix = ":pre" if self.before_activation and position > 0 else ""
        return f"head.{_BRANCHES[branch]}[{position}]{suffix}"

    def _features(self) -> List[str]:
        crossing = "cross" in self.modes
        return [self._tap_key(b) for b in self.positions if crossing and self._crosses(b)]

    def _predictions(self) -> List[str]:
        return [f"pred.{o}" for outputs in self._outputs.values() for o in outputs]

    def _student_needs(self) -> List[str]:
        return ["assign", "anchors", "codec"] + self._predictions() + self._features()

    def _teacher_needs(self) -> List[str]:
        return ["pred.cls", "codec"] + self._predictions() + self._features()

    def validate(self, student_keys, teacher_keys):
        # first, because its errors say more than that a key is missing
        check_pair(student_keys, teacher_keys, self._features())
        super().validate(student_keys, teacher_keys)
        box_dim = dict(student_keys["codec"].signature[1:]).get("box_dim", 4)
        if "reg" in self.positions and self.preset.reg_loss == "kl" and box_dim <= 4:
            raise ValueError(
                'KD.CROSSKD.REG_LOSS "kl" compares distributions of box sides (GFL), but the '
                f"student predicts {box_dim} numbers per box; use giou or iou_log"
            )

    # ----------------------------------------------------------------------------- compute
    def compute(self, ctx) -> Dict[str, torch.Tensor]:
        student = ctx.student
        positions = Positions(
            student.model,
            student["anchors"],
            student["assign"],
            ctx.image_sizes,
            self.preset.masked,
        )
        dims = self._dims(student)
        teacher_cls = _highest(_levels(ctx.teacher["pred.cls"], dims["cls"]))
        terms = {}
        for mode in self.modes:
            for branch, outputs in self._outputs.items():
                predictions, targets = self._pair(ctx, branch, outputs, mode)
                for output in outputs:
                    pair = [_levels(x[output], dims[output]) for x in (predictions, targets)]
                    name, value = self._term(output, pair, positions, teacher_cls, student)
                    terms[self._prefix(mode) + name] = value
        return terms

    @staticmethod
    def _dims(student) -> Dict[str, int]:
        box_dim = getattr(student["codec"], "box_dim", 4)
        return {"cls": student.model.num_classes, "box": box_dim, "ctr": 1}

    def _pair(self, ctx, branch: str, outputs: List[str], mode: str):
        """Per-level predictions and targets, dicts by output."""
        own = {output: ctx.student[f"pred.{output}"] for output in outputs}
        teacher = {output: ctx.teacher[f"pred.{output}"] for output in outputs}
        if mode == "mimic" or not self._crosses(branch):
            return own, teacher
        target_is_constant = self.strategy.target == "cross" and self.detach_target
        with torch.set_grad_enabled(torch.is_grad_enabled() and not target_is_constant):
            cross = self._cross(ctx, branch)
        sides = {"student": own, "teacher": teacher, "cross": cross}
        return sides[self.strategy.prediction], sides[self.strategy.target]

    def _cross(self, ctx, branch: str) -> Dict[str, List[torch.Tensor]]:
        """Pass one side's features through the rest of the other side's head."""
        sides = {"student": ctx.student, "teacher": ctx.teacher}
        moved = sides.pop(self.strategy.moved)
        (host,) = sides.values()
        key, position = self._tap_key(branch), self.positions[branch]
        features = []
        for feature, reference in zip(moved[key], host[key]):
            if self.aligned:
                # statistics in fp32; back to the type that the host's layers are run in
                feature = align_statistics(feature, reference).to(reference.dtype)
            features.append(F.relu(feature) if position > 0 else feature)
        return host.rest_of_head(_BRANCHES[branch], position, features)

    def _term(self, output, pair, positions, teacher_cls, student) -> Tuple[str, torch.Tensor]:
        return getattr(self, f"_{output}_term")(pair, positions, teacher_cls, student)

    def _cls_term(self, pair, positions, teacher_cls, student):
        weights = self.cls_region(positions).float()
        # by level: the only large tensors, not worth copying into one
        losses = [self.cls_loss(*x, self.cls_gamma, self.detach_target) for x in zip(*pair)]
        losses = torch.cat(losses, dim=1)
        return "cls", _normalised(losses, weights, positions, self.preset.cls_normaliser)

    def _box_term(self, pair, positions, teacher_cls, student):
        weights = self.reg_region(positions, teacher_cls)
        codec = student["codec"]
        pair = [torch.cat(levels, dim=1) for levels in pair]
        losses = self.reg_loss(*pair, positions.anchors, codec, self.reg_tau, self.detach_target)
        return "reg", _normalised(losses, weights, positions, self.preset.reg_normaliser)

    def _ctr_term(self, pair, positions, teacher_cls, student):
        pair = [torch.cat(levels, dim=1) for levels in pair]
        losses = centerness_loss(*pair, self.detach_target)
        weights = positions.positive.float()
        return "ctr", _normalised(losses, weights, positions, self.preset.ctr_normaliser)


def _levels(levels: List[torch.Tensor], dim: int) -> List[torch.Tensor]:
    """Per level (N, A*dim, H, W) -> (N, Ri, dim), in the order of the anchors."""
    return [permute_to_N_HWA_K(x, dim) for x in levels]


def _highest(levels: List[torch.Tensor]) -> torch.Tensor:
    """Per level (N, Ri, K) -> (N, R, 1), the highest of the K values."""
    return torch.cat([x.detach().amax(dim=-1, keepdim=True) for x in levels], dim=1)


def _normalised(losses, weights, positions, normaliser: str) -> torch.Tensor:
    return (losses * weights).sum() / NORMALISERS[normaliser](positions, weights)


def _positions(node, preset: Preset, num_stages: Mapping[str, int]) -> Dict[str, int]:
    """Return i of each distilled branch.

    Raises:
        ValueError: no position is set and the preset's is not inside the tower. It would be
            rejected, or in a tower one stage shorter taken for prediction mimicking.
    """
    own = {"cls": node.POSITION_CLS, "reg": node.POSITION_REG}
    result = {}
    for branch in node.BRANCHES:
        position = option(f"POSITION_{branch.upper()}", own[branch])
        result[branch] = preset.position if position is None else position
        if position is None and node.POSITION == -1 and preset.position > num_stages[branch]:
            raise ValueError(
                f"KD.CROSSKD.POSITION is not set; the preset's {preset.position} needs towers of "
                f"as many stages, but branch '{branch}' has {num_stages[branch]} (NUM_CONVS). Set "
                f"it to 0..{num_stages[branch]}, or to {num_stages[branch] + 1} for prediction "
                "mimicking"
            )
    return result
