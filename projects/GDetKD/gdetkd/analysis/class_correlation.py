"""How far the correlations between classes differ between student and teacher (Fig. 6)."""

from typing import Dict

import numpy as np

from kd_d2.distillation import DistillationContext

from ..records import RoIBatch

__all__ = [
    "class_correlation",
    "foreground_logits",
    "mean_off_diagonal",
]


def foreground_logits(
    teacher_stage: int, ctx: DistillationContext, rois: RoIBatch
) -> Dict[str, np.ndarray]:
    """Return the raw logits of the foreground RoIs of a batch, background left out.

    Args:
        teacher_stage: stage of the teacher's head, 0 unless it is a cascade.

    Returns:
        ``student`` and ``teacher``, (M, C) each, fp32.
    """
    chosen, key = rois.select(rois.positive), f"roi.cls[{teacher_stage}]"
    sides = {"student": chosen.cls, "teacher": ctx.teacher.run([key], chosen.boxes)[key]}
    return {s: x[:, : rois.num_classes].detach().float().cpu().numpy() for s, x in sides.items()}


def class_correlation(logits: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation (C, C) of the columns of ``logits`` (M, C) in fp64.

    A column whose values are all equal correlates with nothing, nor with itself: 0.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(logits) < 2:
        raise ValueError(
            f"a correlation needs at least 2 foreground RoIs, got {len(logits)}; take more images"
        )
    values = np.asarray(logits, dtype=np.float64)
    # not from the result: with a rounded mean a constant column correlates at random
    constant = np.ptp(values, axis=0) == 0
    with np.errstate(invalid="ignore", divide="ignore"):
        result = np.atleast_2d(np.corrcoef(values, rowvar=False))
    result[constant] = 0.0
    result[:, constant] = 0.0
    return result


def mean_off_diagonal(matrix: np.ndarray) -> float:
    """Return the mean of the entries (C, C) beside the diagonal; 0 for one class."""
    others = ~np.eye(len(matrix), dtype=bool)
    return float(matrix[others].mean()) if others.any() else 0.0
