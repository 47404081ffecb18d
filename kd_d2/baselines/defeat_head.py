"""DeFeat's part on RoIs: class logits of foreground and background proposals."""

from typing import Dict, Tuple

import torch

from kd_d2.blocks import KL, Pair, PairTerm, Region, Source, Weights
from kd_d2.distillation import require_equal

__all__ = ["proposal_terms"]


class _ProposalLogits(Source):
    """Class logits (M, K + 1) of both networks on the proposals that the student sampled."""

    student_needs = ("proposals", "roi.cls")
    teacher_needs = ("roi.cls",)

    def bind(self, student_keys, teacher_keys):
        for side, keys in (("student", student_keys), ("teacher", teacher_keys)):
            if "roi.cls" not in keys:
                raise ValueError(
                    f"KD.DEFEAT.HEAD_FG_WEIGHT and HEAD_BG_WEIGHT need 'roi.cls', but the {side} "
                    "has no RoI head; set both to 0.0, or use two-stage detectors"
                )
        require_equal("DeFeat", "roi.cls", student_keys, teacher_keys)
        width = student_keys["roi.cls"].channels
        self.widths = ((width, width),)

    def __call__(self, ctx):
        proposals = ctx.student["proposals"]
        boxes = ctx.memo("DeFeat: proposals", lambda: [p.proposal_boxes for p in proposals])
        teacher = ctx.teacher.run(["roi.cls"], boxes)["roi.cls"]
        labels = torch.cat([p.gt_classes for p in proposals])
        return [Pair(ctx.student["roi.cls"], teacher, False, key="roi.cls", rois=labels)]


class _Rows(Region):
    """1 at the foreground, or at the background, of the proposals."""

    def __init__(self, foreground: bool):
        self._foreground = foreground

    def __call__(self, ctx, pair):
        background = pair.num_channels - 1  # Detectron2's label of it
        labels = pair.rois
        if self._foreground:
            return ((labels >= 0) & (labels < background)).float()
        return (labels == background).float()


def proposal_terms(
    fg_weight: float, bg_weight: float, temperature: float
) -> Dict[str, Tuple[PairTerm, float]]:
    """Return "head_fg" and "head_bg", as far as they have a weight, each with it.

    T^2 KL(teacher || student) over the K + 1 classes, mean over the rows of its kind.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"KD.DEFEAT.HEAD_TEMPERATURE must be positive, got {temperature}")
    return {
        name: (
            PairTerm(
                _ProposalLogits(),
                region=_Rows(foreground),
                distance=KL(temperature),
                normaliser=Weights(floor=1.0),
            ),
            weight,
        )
        for name, foreground, weight in (
            ("head_fg", True, fg_weight),
            ("head_bg", False, bg_weight),
        )
        if weight
    }
