"""Distances: one value per position, summed over the channels, in fp32."""

import torch
from torch.nn import functional as F

from kd_d2.losses.quality_focal import quality_focal_loss
from kd_d2.losses.soft_targets import kl_divergence, soft_binary_cross_entropy

from .pair import Block, Pair
from .registry import KD_DISTANCES

__all__ = ["BCE", "KL", "L1", "QFL", "Cosine", "Distance", "SmoothL1", "SquaredL2"]


class Distance(Block):
    """Interface of distances.

    The pair has fp32 (or fp64) tensors and a teacher without graph; autocast is off.
    """

    def __call__(self, ctx, pair: Pair) -> torch.Tensor:
        """Return the values of the shape ``pair.positions``."""
        raise NotImplementedError


@KD_DISTANCES.register()
class SquaredL2(Distance):
    """``scale`` times the squared difference, summed over the channels."""

    def __init__(self, scale: float = 1.0):
        self._scale = scale

    def __call__(self, ctx, pair):
        difference = pair.student - pair.teacher
        return self._scale * difference.square().sum(pair.channel_dim)


@KD_DISTANCES.register()
class L1(Distance):
    """Absolute difference, summed over the channels."""

    def __call__(self, ctx, pair):
        return (pair.student - pair.teacher).abs().sum(pair.channel_dim)


@KD_DISTANCES.register()
class SmoothL1(Distance):
    """Smooth L1 (Huber divided by beta), summed over the channels."""

    def __init__(self, beta: float = 1.0):
        self._beta = beta

    def __call__(self, ctx, pair):
        values = F.smooth_l1_loss(pair.student, pair.teacher, reduction="none", beta=self._beta)
        return values.sum(pair.channel_dim)


@KD_DISTANCES.register()
class BCE(Distance):
    """Binary cross-entropy of logits with the teacher's probabilities, summed over the classes."""

    def __call__(self, ctx, pair):
        return soft_binary_cross_entropy(pair.student, pair.teacher).sum(pair.channel_dim)


@KD_DISTANCES.register()
class QFL(Distance):
    """Quality focal loss of logits towards the teacher's probabilities, summed over the classes."""

    def __init__(self, gamma: float = 1.0):
        self._gamma = gamma

    def __call__(self, ctx, pair):
        targets = pair.teacher.sigmoid()
        return quality_focal_loss(pair.student, targets, self._gamma).sum(pair.channel_dim)


@KD_DISTANCES.register()
class KL(Distance):
    """tau^2 KL(teacher || student) of the softmax over the channels; see ``kl_divergence``."""

    def __init__(self, temperature: float = 1.0, bins: str = "sum"):
        """``bins``: "sum" or "mean" over the channels."""
        self._temperature, self._bins = temperature, bins

    def __call__(self, ctx, pair):
        logits = (x.movedim(pair.channel_dim, -1) for x in (pair.student, pair.teacher))
        return kl_divergence(*logits, temperature=self._temperature, bins_reduction=self._bins)


@KD_DISTANCES.register()
class Cosine(Distance):
    """1 - cosine similarity along the channels; (1, 0) and (1, 1): 0.292893."""

    def __call__(self, ctx, pair):
        return 1 - F.cosine_similarity(pair.student, pair.teacher, dim=pair.channel_dim)
