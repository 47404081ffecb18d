"""Structural similarity of feature maps as a distance."""

import torch
from torch.nn import functional as F

from .distances import Distance
from .registry import KD_DISTANCES

__all__ = ["SSIM", "structural_similarity"]

_REACH, _SIGMA = 5, 1.5


def structural_similarity(
    x: torch.Tensor, y: torch.Tensor, data_range: float = 1.0
) -> torch.Tensor:
    """SSIM index of every element, in an 11x11 Gaussian window (sigma 1.5) of its own channel.

    Borders are mirrored (as often as needed: maps may be smaller than the window). Constant maps
    .2 and .6 give 0.600100, equal maps 1.

    Args:
        x, y: (N, C, H, W), fp32 or fp64.
        data_range: L of the constants (.01 L)^2 and (.03 L)^2.

    Returns:
        (N, C, H, W), differentiable in both.
    """
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    # second moments about a constant near the mean: E[x^2] - E[x]^2 loses its digits otherwise
    centres = [z.detach().mean(dim=(2, 3), keepdim=True) for z in (x, y)]
    u, v = x - centres[0], y - centres[1]
    mean_u, mean_v = _blurred(u), _blurred(v)
    covariance = _blurred(u * v) - mean_u * mean_v
    variances = _blurred(u * u + v * v) - mean_u.square() - mean_v.square()
    mean_x, mean_y = mean_u + centres[0], mean_v + centres[1]
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance * (2 * covariance + c2) / (variances.clamp(min=0) + c2)


def _blurred(x: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(-_REACH, _REACH + 1, device=x.device, dtype=x.dtype)
    kernel = torch.softmax(-0.5 * (offsets / _SIGMA).square(), dim=0)
    n, c, height, width = x.shape
    x = x.index_select(2, _mirrored(height, x.device)).index_select(3, _mirrored(width, x.device))
    x = x.reshape(n * c, 1, *x.shape[2:])
    x = F.conv2d(F.conv2d(x, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    return x.view(n, c, height, width)


def _mirrored(size: int, device) -> torch.Tensor:
    """Indices of a side of ``size`` cells that goes on mirrored at both ends, its border once."""
    indices = torch.arange(-_REACH, size + _REACH, device=device)
    period = max(2 * (size - 1), 1)
    indices = indices.remainder(period)
    return torch.minimum(indices, period - indices) if size > 1 else torch.zeros_like(indices)


@KD_DISTANCES.register()
class SSIM(Distance):
    """(1 - SSIM) / 2 of every element, summed over the channels."""

    def __init__(self, data_range: float = 1.0):
        """Raises ``ValueError`` unless ``data_range`` is positive."""
        if not data_range > 0:
            raise ValueError(f"SSIM: data_range must be positive, got {data_range}")
        self._data_range = data_range

    def __call__(self, ctx, pair):
        similarity = structural_similarity(pair.student, pair.teacher, self._data_range)
        return ((1 - similarity) / 2).sum(pair.channel_dim)
