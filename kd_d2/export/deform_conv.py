"""Deformable convolution out of operators that every ONNX runtime has."""

from typing import Optional, Tuple, Union

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["sampled_deform_conv2d"]

_Pair = Union[int, Tuple[int, int]]


def sampled_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    mask: Optional[Tensor] = None,
) -> Tensor:
    """:func:`torchvision.ops.deform_conv2d` with one group, through ``grid_sample``.

    ONNX has DeformConv since operator set 19, but ONNX Runtime 1.23 does not compute it on a CPU,
    and PyTorch's exporter does not write it. The values that the taps read, C * kh * kw of each
    output cell, are made as one tensor, as torchvision does it too.

    Args:
        input: (N, C, H, W).
        offset: (N, 2 * kh * kw, H', W'), y and x of each tap in turn, in cells.
        weight: (C', C, kh, kw).
        bias: (C',).
        stride, padding, dilation: number, or (vertical, horizontal).
        mask: (N, kh * kw, H', W') factors of the taps.

    Returns:
        (N, C', H', W').

    Raises:
        ValueError: several groups, of weights or offsets.
    """
    kernel = weight.shape[-2:]
    num_taps = kernel[0] * kernel[1]
    if weight.shape[1] != input.shape[1] or offset.shape[1] != 2 * num_taps:
        raise ValueError(
            "Only deformable convolutions of one group can be exported, got an input of "
            f"{int(input.shape[1])} channels, weights {tuple(weight.shape)} and "
            f"{int(offset.shape[1])} offsets"
        )
    sides, sizes = input.shape[-2:], offset.shape[-2:]
    axes = []  # of y and x: what each tap reads, (N, taps, H', W')
    for axis, step, pad, gap in zip((0, 1), *map(_pair, (stride, padding, dilation))):
        taps = torch.arange(num_taps, device=input.device)
        taps = taps % kernel[1] if axis else torch.div(taps, kernel[1], rounding_mode="floor")
        cells = torch.arange(sizes[axis], device=input.device) * step - pad
        cells = cells[None, :] if axis else cells[:, None]
        position = offset[:, axis::2] + (gap * taps[:, None, None] + cells).to(offset.dtype)
        # grid_sample has the centres of the first and the last cell half a cell within -1 and 1.
        axes.append((2 * position + 1) / sides[axis] - 1)
    grid = torch.stack(axes[::-1], dim=-1).flatten(1, 2)  # (N, taps * H', W', 2)
    read = F.grid_sample(
        input, grid, mode="bilinear", padding_mode="zeros", align_corners=False
    )  # (N, C, taps * H', W')
    read = read.reshape(read.shape[0], read.shape[1], num_taps, sizes[0], sizes[1])
    if mask is not None:
        read = read * mask[:, None]
    return F.conv2d(read.flatten(1, 2), weight.flatten(1)[:, :, None, None], bias)


def _pair(value: _Pair) -> Tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
