"""Initial probability of the background in a softmax."""

import math

from torch import nn

__all__ = ["init_background"]


def init_background(cls_score: nn.Module, prior_prob: float, key: str) -> None:
    """Set the background's bias so that the classes share ``prior_prob`` while weights are small.

    Ours. With biases of zero all K + 1 answers start alike, and the first iterations go into making
    almost every box background; in short runs no classes were learnt afterwards
    (docs/results/mimicdet.md).

    Args:
        cls_score: layer of K + 1 logits with a bias, the last one the background's.
        prior_prob: in [0, 1); 0 leaves the biases alone (paper).
        key: below ``MODEL.MIMICDET``, for the error.

    Raises:
        ValueError: ``prior_prob`` is out of its range.
    """
    if not 0 <= prior_prob < 1:
        raise ValueError(f"MODEL.MIMICDET.{key} must be in [0, 1), got {prior_prob}")
    if prior_prob > 0:
        num_classes = len(cls_score.bias) - 1
        background = math.log(num_classes * (1 - prior_prob) / prior_prob)
        nn.init.constant_(cls_score.bias[-1:], background)
