"""L2 normalisation over channels with a learnable scale."""

import torch
from torch import Tensor, nn

__all__ = ["L2Norm"]


class L2Norm(nn.Module):
    """Scales the vector of channels at each position to unit length, then each channel.

    x / (|x|_2 + 1e-10) * w, computed in fp32 (ParseNet; SSD uses it on conv4_3).
    """

    def __init__(self, channels: int, init: float = 20.0):
        """
        Args:
            channels: C.
            init: first value of all C weights.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) of the type of ``x``."""
        with torch.autocast(x.device.type, enabled=False):
            values = x.float()
            norm = values.norm(dim=1, keepdim=True) + 1e-10
            return (values / norm * self.weight.float().view(1, -1, 1, 1)).to(x.dtype)
