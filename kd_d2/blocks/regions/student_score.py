"""Weights by the student's own confidence."""

from kd_d2.distillation import sigmoid_classes

from ..locations import anchor_rows
from ..registry import KD_REGIONS
from .base import AnchorRegion

__all__ = ["StudentScore"]


@KD_REGIONS.register()
class StudentScore(AnchorRegion):
    """Largest class probability of the student at every anchor, a constant: q of LD and GFL."""

    student_needs = ("anchors", "pred.cls")

    def bind(self, student_keys, teacher_keys):
        super().bind(student_keys, teacher_keys)
        if "pred.cls" not in student_keys:
            raise ValueError(
                "StudentScore needs 'pred.cls' of the student, which it does not have: it must be "
                "a dense detector"
            )
        self._classes = sigmoid_classes("StudentScore", "student", student_keys)

    def anchors(self, ctx):
        levels = ctx.student["pred.cls"]
        return anchor_rows(levels, self._classes).amax(dim=2).sigmoid()
