"""Scores that are multiplied by a factor after candidates have been chosen."""

from torch import Tensor

from .topk import bounded_topk

__all__ = ["apply_score_factor"]


def apply_score_factor(scores: Tensor, factors: Tensor, threshold: float, topk: int) -> Tensor:
    """Multiplies the candidates' scores by their factor and drops all other scores.

    Detectors with centerness choose candidates by class score alone and rank them by class score
    times centerness afterwards. The result, thresholded at 0, is those candidates.

    Args:
        scores: (..., R, K) class probabilities of one level, of one image or of several. Not
            modified.
        factors: (..., R, 1) or (..., R, K), positive.
        threshold: candidates have a score above this.
        topk: at most so many candidates of an image, the highest scores.

    Returns:
        (..., R, K): score times factor for candidates, 0 elsewhere.
    """
    flat = scores.flatten(-2)
    best, indices = bounded_topk(flat, topk)
    kept = best.new_zeros(flat.shape).scatter(-1, indices, best * (best > threshold))
    return kept.view_as(scores) * factors
