"""Residual blocks with free widths and an explicit shortcut.

Detectron2's blocks have one inner width and add a projection exactly where the number of channels
changes; a pruned or rearranged network has other combinations. Names of parameters are the same.
"""

from typing import Callable, Optional, Tuple, Union

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from torch import Tensor

from .space import Block

__all__ = ["MorphBlock"]

Norm = Union[str, Callable]

# Kernel sizes of the convs of a basic block and of a bottleneck; the stride is that of the first
# 3x3 conv.
_KERNELS = {2: (3, 3), 3: (1, 3, 1)}


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int, groups: int, norm: Norm
) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        bias=False,
        norm=get_norm(norm, out_channels),
    )
    weight_init.c2_msra_fill(conv)
    return conv


class MorphBlock(CNNBlockBase):
    """A basic block or a bottleneck.

    Where input and output have the same channels and nothing is projected, the shortcut is the
    identity; at stride 2 it keeps every second row and column, ceil(n/2) of n, which is the output
    size of the 3x3 conv.

    Args:
        block: widths of the convs, groups, and whether the shortcut is a projection.
        in_channels: channels of the input.
        stride: 1 or 2, that of the first 3x3 conv and of the shortcut.
        norm: batch norm after every conv, as in ``detectron2.layers.get_norm``.
    """

    def __init__(self, block: Block, in_channels: int, *, stride: int, norm: Norm):
        super().__init__(in_channels, block.out_channels, stride)
        self.shortcut: Optional[Conv2d] = None
        if block.projection:
            self.shortcut = _conv(in_channels, block.out_channels, 1, stride, 1, norm)
        kernels = _KERNELS[len(block.channels)]
        strided = kernels.index(3)
        widths = (in_channels, *block.channels)
        for index, kernel in enumerate(kernels):
            conv = _conv(
                *(widths[index], widths[index + 1], kernel),
                stride if index == strided else 1,
                block.groups if index == strided else 1,
                norm,
            )
            self.add_module(f"conv{index + 1}", conv)
        self.num_convs = len(kernels)

    @property
    def convs(self) -> Tuple[Conv2d, ...]:
        """The convs of the residual branch, in order; each has its norm as ``.norm``."""
        return tuple(getattr(self, f"conv{index + 1}") for index in range(self.num_convs))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C_out, ceil(H/stride), ceil(W/stride)) of ``x`` (N, C_in, H, W)."""
        *inner, last = self.convs
        out = x
        for conv in inner:
            out = F.relu_(conv(out))
        out = last(out)
        out += self._shortcut(x)
        return F.relu_(out)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            return self.shortcut(x)
        return x if self.stride == 1 else x[:, :, ::2, ::2]
