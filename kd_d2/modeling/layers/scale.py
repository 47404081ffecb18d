"""A learnable factor."""

import torch
from torch import Tensor, nn

__all__ = ["Scale"]


class Scale(nn.Module):
    """Multiplies its input by one learnable number.

    FCOS, GFL and ATSS share the box predictor between pyramid levels and give every level one
    such factor.
    """

    def __init__(self, init: float = 1.0):
        """
        Args:
            init: start value, dimensionless.
        """
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(init)))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` times the factor, same shape and type."""
        return x * self.scale
