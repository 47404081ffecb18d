"""Regions that the predictions of the networks determine; constants, without gradient."""

from typing import List, Sequence

import torch

from kd_d2.distillation import require_equal, sigmoid_classes

from ..pair import Grid
from ..registry import KD_REGIONS
from .base import CellRegion, at_strides

__all__ = ["PredDiff", "TeacherConf"]

# class logits of a one-stage, objectness of a two-stage detector
_SCORES = ("pred.cls", "rpn.obj")


def _logits(view, key: str, strides, grids: Sequence[Grid], what: str) -> List[torch.Tensor]:
    """Return the (N, A*K, H, W) fp32 logits of the levels of ``grids``."""
    levels = at_strides(what, strides, view[key], grids)
    for level, grid in zip(levels, grids):
        if tuple(level.shape[-2:]) != (grid.height, grid.width):
            raise ValueError(
                f"{what} have {tuple(level.shape[-2:])} cells at stride {grid.stride}, the "
                f"compared maps {(grid.height, grid.width)}: the networks must have equal levels"
            )
    return [level.detach().float() for level in levels]


@KD_REGIONS.register()
class TeacherConf(CellRegion):
    """The teacher's largest class probability among the anchors and classes of a cell.

    For a two-stage teacher its RPN's largest objectness. Of FRS (Du et al., Distilling Object
    Detectors with Feature Richness, NeurIPS 2021), as in its official code.
    """

    def bind(self, student_keys, teacher_keys):
        found = [key for key in _SCORES if key in teacher_keys]
        if not found:
            raise ValueError(
                "TeacherConf needs 'pred.cls' or 'rpn.obj' of the teacher, which has neither; use "
                "a detector as teacher or another region"
            )
        self._key, self.teacher_needs = found[0], (found[0],)
        if self._key == "pred.cls":
            sigmoid_classes("TeacherConf", "teacher", teacher_keys)
        self.strides = teacher_keys[self._key].strides

    def cells(self, ctx, grids):
        what = f"'{self._key}' of the teacher"
        levels = _logits(ctx.teacher, self._key, self.strides, grids, what)
        return [level.amax(dim=1).sigmoid() for level in levels]


@KD_REGIONS.register()
class PredDiff(CellRegion):
    """Mean over the class channels of (sigmoid(teacher) - sigmoid(student))^2, of every cell.

    Of PFI (unverified: known from a port, which passes raw scores); the student's side is a
    constant, too (our decision). Between two-stage detectors of the objectness of their RPNs.
    """

    def bind(self, student_keys, teacher_keys):
        found = [key for key in _SCORES if key in student_keys and key in teacher_keys]
        if not found:
            raise ValueError(
                "PredDiff compares 'pred.cls' (or 'rpn.obj') of student and teacher, but they do "
                "not have the same one: both must be one-stage or both two-stage detectors"
            )
        key = self._key = found[0]
        for fact in (key, "anchors"):
            require_equal("PredDiff", fact, student_keys, teacher_keys)
        if key == "pred.cls":
            sigmoid_classes("PredDiff", "student", student_keys)
        self.student_needs = self.teacher_needs = (key,)
        self.strides = student_keys[key].strides

    def cells(self, ctx, grids):
        ours, theirs = (
            _logits(view, self._key, self.strides, grids, f"'{self._key}' of the {side}")
            for side, view in (("student", ctx.student), ("teacher", ctx.teacher))
        )
        return [(t.sigmoid() - s.sigmoid()).square().mean(dim=1) for s, t in zip(ours, theirs)]
