"""PKD: imitation of feature maps by their Pearson correlation."""

from dataclasses import replace
from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from torch.nn import functional as F

from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, Distiller, Key, MethodInfo, require_equal
from kd_d2.losses.imitation import pkd_loss

__all__ = ["PKD", "add_pkd_config"]


@CONFIG_NODES.register()
def add_pkd_config(cfg: CN) -> None:
    """Add ``KD.PKD``."""
    cfg.KD.PKD = node = CN()
    # Keys of the student and the teacher that are paired, one loss per entry, summed.
    # "neck": all pyramid levels; "cls", "reg": the tower of that branch after STAGE stages.
    node.LOCATIONS = ("neck",)
    # Tower stage for "cls" and "reg", from 1, post-activation; 3 of 4 in CrossKD's Table 2.
    node.STAGE = 3
    # Weight of the summed loss. Beside CrossKD, 5 levels: GFL 6.0, RetinaNet and FCOS 2.0, ATSS
    # 1.0. PKD's official configs, 4 levels: Faster R-CNN R-101 -> R-50 and Mask R-CNN Swin-S ->
    # RetinaNet R-50 6.0; RetinaNet X101 -> R-50 and FCOS X101 -> RetinaNet R-50 10.0.
    node.WEIGHT = 6.0
    # Indices of the levels that are paired, fine to coarse, on either side; (): all. mmrazor's
    # official configs have (0, 1, 2, 3): P2-P5 of a two-stage teacher then teach P3-P6 of a
    # RetinaNet, with RESIZE.
    node.LEVELS = ()
    # Resize the student's maps bilinearly when sizes differ; False: differing sizes are an error.
    node.RESIZE = True
    add_schedule_config(node)


# location in the config -> the taps' name of the tower
_TOWERS = {"cls": "cls", "reg": "box"}


def _key(location: str, stage: int, student_keys, teacher_keys) -> str:
    """Key of a location: the pyramid, or the output of a stage of a tower."""
    if location == "neck":
        return "neck"
    if location not in _TOWERS:
        raise ValueError(f"KD.PKD.LOCATIONS knows 'neck', 'cls' and 'reg', got '{location}'")
    tower = f"head.{_TOWERS[location]}"
    for side, keys in (("student", student_keys), ("teacher", teacher_keys)):
        parsed = [Key.parse(key) for key in keys if key.startswith(tower + "[")]
        available = max((key.index for key in parsed), default=0)
        if not 1 <= stage <= available:
            raise ValueError(
                f"KD.PKD.STAGE is {stage}, but tower '{location}' of the {side} has {available} "
                "stages (NUM_CONVS)"
            )
    return f"{tower}[{stage}]"


@DISTILLER_REGISTRY.register()
class PKD(Distiller):
    """Half the mean squared difference of features standardised per channel.

    General Distillation Framework for Object Detectors via Pearson Correlation Coefficient (Cao
    et al., NeurIPS 2022), as CrossKD's official code uses it on the pyramid: all levels, no
    adapter, sum over levels. Equal to (1 - r)(M - 1)/M averaged over channels with the
    correlation r over the M = N·H·W positions of a channel. On the towers (CrossKD's Table 2) it
    compares the features after stage 3 of 4, behind the ReLU; student layers after them get no
    gradient.
    """

    info = MethodInfo(
        title="PKD: imitation by Pearson's correlation",
        paper="Cao et al., PKD: General Distillation Framework for Object Detectors via Pearson "
        "Correlation Coefficient, NeurIPS 2022",
        compares="pyramid maps, standardised per channel",
        requires=("equal channels",),
        gains=(
            "GFL R-101 -> R-50: 40.2 -> 43.3 (CrossKD's Table 7)",
            "RetinaNet X101-64x4d -> R-50 2x: 37.4 -> 40.8 (PKD's paper)",
            "Faster R-CNN R-101 -> R-50 2x: 38.4 -> 40.4 (PKD's paper)",
        ),
    )

    @configurable
    def __init__(
        self,
        *,
        pairs: List[Tuple[str, str]],
        weight: float = 6.0,
        resize: bool = True,
        levels: Sequence[int] = (),
    ):
        """
        Args:
            pairs: (key of the student, key of the teacher), each a per-level list.
            weight: of the sum over pairs and levels.
            resize: bilinearly resize the student's maps to the teacher's size if they differ.
            levels: indices of the levels that are paired; empty: all.
        """
        super().__init__(
            weights={"feat": weight},
            student_needs=[student for student, _ in pairs],
            teacher_needs=[teacher for _, teacher in pairs],
        )
        self.pairs = list(pairs)
        self.resize = resize
        self.levels = tuple(levels)

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node = cls.config_node(cfg)
        if not node.LOCATIONS:
            raise ValueError("KD.PKD.LOCATIONS must not be empty")
        keys = [_key(where, node.STAGE, student_keys, teacher_keys) for where in node.LOCATIONS]
        return {
            "pairs": [(key, key) for key in keys],
            "weight": node.WEIGHT,
            "resize": node.RESIZE,
            "levels": node.LEVELS,
        }

    def validate(self, student_keys, teacher_keys):
        super().validate(student_keys, teacher_keys)
        for student, teacher in self.pairs:
            ours, theirs = student_keys[student], teacher_keys[teacher]
            counts = len(ours.strides), len(theirs.strides)
            if not self.levels and counts[0] != counts[1]:
                raise ValueError(
                    f"PKD pairs levels of '{student}' one to one, but the student has "
                    f"{counts[0]} and the teacher {counts[1]}; choose some with KD.PKD.LEVELS"
                )
            if any(not 0 <= level < min(counts) for level in self.levels):
                raise ValueError(
                    f"KD.PKD.LEVELS is {self.levels}, but of '{student}' the student has "
                    f"{counts[0]} levels and the teacher {counts[1]}"
                )
            facts = [
                {student: replace(info, strides=tuple(self._chosen(info.strides)))}
                for info in (ours, theirs)
            ]
            attributes = ("channels",) if self.resize else ("channels", "strides")
            require_equal("PKD", student, *facts, attributes=attributes)

    def _chosen(self, levels: Sequence) -> List:
        return [levels[i] for i in self.levels] if self.levels else list(levels)

    def compute(self, ctx) -> Dict[str, torch.Tensor]:
        total = 0.0
        for student_key, teacher_key in self.pairs:
            sides = (self._chosen(x) for x in (ctx.student[student_key], ctx.teacher[teacher_key]))
            for student, teacher in zip(*sides):
                if student.shape[-2:] != teacher.shape[-2:]:
                    student = self._resized(student, teacher)
                total = total + pkd_loss(student, teacher)
        return {"feat": total}

    def _resized(self, student, teacher):
        if not self.resize:
            raise ValueError(
                f"PKD: maps differ in size, student {tuple(student.shape[-2:])}, teacher "
                f"{tuple(teacher.shape[-2:])}; set KD.PKD.RESIZE True or use equal strides"
            )
        size = teacher.shape[-2:]
        return F.interpolate(student, size=size, mode="bilinear", align_corners=False)
