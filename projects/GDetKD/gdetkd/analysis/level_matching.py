"""Which of the student's pyramid levels SGFI matches with the teacher's (Fig. 5)."""

from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np
import torch
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor

from kd_d2.blocks import pyramid_pooler
from kd_d2.distillation import DistillationContext

from ..feature_terms import SGFITerm
from ..records import RoIBatch

__all__ = ["LevelMatches", "histogram", "level_weights", "teacher_levels"]


def teacher_levels(boxes: List[Boxes], strides: Sequence[int]) -> Tensor:
    """Return (R,) index of the level, by size, from which a RoI head pools each box."""
    pooler = pyramid_pooler(strides, 1)
    return assign_boxes_to_levels(
        boxes,
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )


def level_weights(
    term: SGFITerm, teacher_strides: Sequence[int], ctx: DistillationContext, rois: RoIBatch
) -> Dict[str, np.ndarray]:
    """Return what SGFI makes of the foreground RoIs of a batch.

    Args:
        term: the trained term.
        teacher_strides: of the levels that the teacher's RoI head pools from.

    Returns:
        ``alpha`` (M, L), ``teacher_level`` (M,) index, ``boxes`` (M, 4), ``gt_classes`` (M,).
    """
    chosen = rois.select(rois.positive)
    student = term.pool([ctx.student[key] for key in term.student_needs], chosen.boxes)
    teacher = ctx.teacher.run(["roi.feat"], chosen.boxes)["roi.feat"]
    values = {
        "alpha": term.sgfi(student, teacher).alpha,
        "teacher_level": teacher_levels(chosen.boxes, teacher_strides),
        "boxes": torch.cat([boxes.tensor for boxes in chosen.boxes]),
        "gt_classes": chosen.gt_classes,
    }
    return {name: value.cpu().numpy() for name, value in values.items()}


def histogram(values: np.ndarray) -> Dict[int, float]:
    """Return integer -> fraction of the values, from the smallest to the largest; {} for none."""
    if not len(values):
        return {}
    smallest = int(values.min())
    counts = np.bincount(values - smallest)
    return {smallest + i: float(count) / len(values) for i, count in enumerate(counts)}


@dataclass(frozen=True)
class LevelMatches:
    """Levels of M RoIs.

    Attributes:
        alpha: (M, L) weights of the student's levels.
        teacher_level: (M,) index of the teacher's level in its own pyramid.
        student_strides, teacher_strides: of both pyramids, fine to coarse.
    """

    alpha: np.ndarray
    teacher_level: np.ndarray
    student_strides: Sequence[int]
    teacher_strides: Sequence[int]

    @property
    def student_level(self) -> np.ndarray:
        """(M,) index of the level of the largest weight; the finest of equal ones."""
        return self.alpha.argmax(axis=1)

    @property
    def index_difference(self) -> np.ndarray:
        """(M,) the paper's quantity: student's index minus teacher's, each in its own pyramid.

        Where the student's pyramid starts one level coarser, -1 is the same physical level.
        """
        return self.student_level - self.teacher_level

    @property
    def level_difference(self) -> np.ndarray:
        """(M,) log2 of the ratio of the strides: 0 is the same physical level."""
        ours, theirs = (
            np.rint(np.log2(strides)).astype(int)
            for strides in (self.student_strides, self.teacher_strides)
        )
        return ours[self.student_level] - theirs[self.teacher_level]

    def summary(self) -> Dict[str, Any]:
        """Return both histograms with their modes, mean weights, and counts by pair of levels."""
        counts = np.zeros((len(self.student_strides), len(self.teacher_strides)), dtype=int)
        np.add.at(counts, (self.student_level, self.teacher_level), 1)
        differences: Mapping[str, np.ndarray] = {
            "index_difference": self.index_difference,
            "level_difference": self.level_difference,
        }
        result: Dict[str, Any] = {"rois": len(self.alpha)}
        for name, values in differences.items():
            found = histogram(values)
            result[name] = found
            result[f"{name}_mode"] = max(found, key=found.get, default=None)
        mean = self.alpha.mean(axis=0) if len(self.alpha) else np.zeros(len(counts))
        names = [f"p{round(np.log2(stride))}" for stride in self.student_strides]
        result["mean_alpha"] = dict(zip(names, mean.tolist()))
        result["counts"] = counts.tolist()
        return result
