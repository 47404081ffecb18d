"""Weights by the student's own confidence."""

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K

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
        self._classes = student_keys["pred.cls"].signature[0]

    def anchors(self, ctx):
        levels = ctx.student["pred.cls"]
        scores = [permute_to_N_HWA_K(x.detach().float(), self._classes).amax(dim=2) for x in levels]
        return torch.cat(scores, dim=1).sigmoid()
