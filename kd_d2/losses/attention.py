"""Where and in which channels a feature map is large: the attention of FGD."""

import torch
from torch import Tensor

from kd_d2.losses.precision import full_precision

__all__ = ["channel_attention", "spatial_attention"]


def spatial_attention(x: Tensor, temperature: float = 1.0) -> Tensor:
    """H W softmax over the positions of (mean_c |x|) / tau (FGD); its mean is 1.

    Args:
        x: (N, C, H, W); half precision is cast to fp32.
        temperature: tau > 0.

    Returns:
        (N, 1, H, W).
    """
    x = full_precision(x)
    values = x.abs().mean(dim=1).flatten(1)
    attention = values.shape[1] * torch.softmax(values / temperature, dim=1)
    return attention.view(len(x), 1, *x.shape[2:])


def channel_attention(x: Tensor, temperature: float = 1.0) -> Tensor:
    """C softmax over the channels of (mean_hw |x|) / tau (FGD); its mean is 1.

    Args:
        x: (N, C, H, W); half precision is cast to fp32.
        temperature: tau > 0.

    Returns:
        (N, C, 1, 1).
    """
    values = full_precision(x).abs().mean(dim=(2, 3), keepdim=True)
    return values.shape[1] * torch.softmax(values / temperature, dim=1)
