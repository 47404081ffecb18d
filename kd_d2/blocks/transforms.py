"""Transforms: what both sides pass before they are compared."""

from dataclasses import replace

import torch

from kd_d2.losses.imitation import standardise

from .pair import Pair
from .registry import KD_TRANSFORMS

__all__ = ["Flatten", "L2Norm", "Sigmoid", "Softmax", "SpatialSoftmax", "Standardise", "Transform"]


class Transform:
    """Interface of transforms: ``Pair -> Pair``, differentiable, in fp32."""

    def __call__(self, pair: Pair) -> Pair:
        raise NotImplementedError


@KD_TRANSFORMS.register()
class Standardise(Transform):
    """Mean 0 and deviation 1 per channel over (N, H, W) of the rank's batch (PKD)."""

    def __init__(self, eps: float = 1e-6):
        self._eps = eps

    def __call__(self, pair):
        return pair.map(lambda x: standardise(x, self._eps))


@KD_TRANSFORMS.register()
class Sigmoid(Transform):
    """Probabilities of independent classes from logits."""

    def __call__(self, pair):
        return pair.map(torch.sigmoid)


@KD_TRANSFORMS.register()
class Softmax(Transform):
    """Probabilities along the channels from logits, which are divided by ``temperature``."""

    def __init__(self, temperature: float = 1.0):
        """Raises ``ValueError`` unless ``temperature`` is positive."""
        self._temperature = _positive("Softmax", temperature)

    def __call__(self, pair):
        return pair.map(lambda x: torch.softmax(x / self._temperature, dim=pair.channel_dim))


@KD_TRANSFORMS.register()
class SpatialSoftmax(Transform):
    """Every channel of a map as a distribution over its H*W positions; they sum to 1."""

    def __init__(self, temperature: float = 1.0):
        """Raises ``ValueError`` unless ``temperature`` is positive."""
        self._temperature = _positive("SpatialSoftmax", temperature)

    def __call__(self, pair):
        if not pair.maps:
            raise ValueError(
                f"SpatialSoftmax works on maps (N, C, H, W), but '{pair.key}' are rows; use Softmax"
            )

        def attention(x):
            return torch.softmax(x.flatten(2) / self._temperature, dim=-1).view_as(x)

        return pair.map(attention)


def _positive(name: str, temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}")
    return temperature


@KD_TRANSFORMS.register()
class L2Norm(Transform):
    """Unit length along the channels."""

    def __call__(self, pair):
        return pair.map(lambda x: torch.nn.functional.normalize(x, dim=pair.channel_dim))


@KD_TRANSFORMS.register()
class Flatten(Transform):
    """Maps (N, C, H, W) as rows (N, C, H*W): one distribution over the positions per channel.

    With the distance ``KL`` this is channel-wise distillation (CWD).
    """

    def __call__(self, pair):
        flat = pair.map(lambda x: x.flatten(2))
        return replace(flat, maps=False, grids=(), level=None)
