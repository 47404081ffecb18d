"""Normalisers: what the weighted sum of a pair is divided by."""

import torch

from kd_d2.modeling.layers import reduce_mean

from .pair import Block, Pair
from .regions import assignment_of
from .registry import KD_NORMALISERS

__all__ = ["Const", "Elements", "Images", "Normaliser", "Positives", "Weights"]


class Normaliser(Block):
    """Interface of normalisers."""

    def __call__(self, ctx, pair: Pair, weights: torch.Tensor) -> torch.Tensor:
        """Return Z > 0, a scalar without gradient.

        Args:
            weights: of the positions, in the shape ``pair.positions``.
        """
        raise NotImplementedError


@KD_NORMALISERS.register()
class Elements(Normaliser):
    """Number of compared elements: positions with a weight, times channels. Gives a mean."""

    def __init__(self, every: bool = False):
        """``every``: positions without a weight count, too."""
        self._every = every

    def __call__(self, ctx, pair, weights):
        counted = torch.ones_like(weights) if self._every else weights != 0
        return counted.sum().clamp(min=1) * float(pair.num_channels)


@KD_NORMALISERS.register()
class Weights(Normaliser):
    """``factor`` times the sum of the weights (times channels); at least ``floor``; + ``eps``."""

    def __init__(
        self,
        factor: float = 1.0,
        channels: bool = False,
        floor: float = 1e-6,
        eps: float = 0.0,
    ):
        self._factor, self._channels, self._floor, self._eps = factor, channels, floor, eps

    def __call__(self, ctx, pair, weights):
        factor = self._factor * (pair.num_channels if self._channels else 1)
        return (factor * weights.sum()).clamp(min=self._floor) + self._eps


@KD_NORMALISERS.register()
class Images(Normaliser):
    """``factor`` times the number of images of the rank's batch (times channels)."""

    def __init__(self, channels: bool = False, factor: float = 1.0):
        self._channels, self._factor = channels, factor

    def __call__(self, ctx, pair, weights):
        number = max(len(ctx.image_sizes), 1) * self._factor
        if self._channels:
            # rows that lie on no grid have them in front: channels of flattened maps, of RoIs
            number *= pair.num_channels if pair.grids else pair.student.shape[1]
        return weights.new_full((), float(number))


@KD_NORMALISERS.register()
class Positives(Normaliser):
    """Positives of the student's assigner, at least 1 an image; over the rank or its mean."""

    student_needs = ("assign",)

    def __init__(self, over: str = "ranks"):
        """``over``: "ranks" (mean over all ranks, collective) or "rank" (this one)."""
        if over not in ("rank", "ranks"):
            raise ValueError(f'Positives: over must be "rank" or "ranks", got {over!r}')
        self._reduced = over == "ranks"

    def __call__(self, ctx, pair, weights):
        # one collective operation a step, whatever the number of pairs and terms
        return ctx.memo((Positives, self._reduced), lambda: self._number(ctx))

    def _number(self, ctx) -> torch.Tensor:
        number = assignment_of(ctx).positive.sum(dim=1).clamp(min=1).sum().float()
        return reduce_mean(number) if self._reduced else number


@KD_NORMALISERS.register()
class Const(Normaliser):
    """A number."""

    def __init__(self, value: float = 1.0):
        """Raises ``ValueError`` unless ``value`` is positive."""
        if not value > 0:
            raise ValueError(f"Const: the divisor must be positive, got {value}")
        self._value = value

    def __call__(self, ctx, pair, weights):
        return weights.new_full((), float(self._value))
