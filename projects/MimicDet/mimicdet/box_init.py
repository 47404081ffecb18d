"""Initial weights with which the offset micro-network spreads the taps over the adjusted box."""

import torch
from torch import Tensor, nn

__all__ = ["init_micro_network"]

# logarithmic sizes between which exp is interpolated; constant below, straight above them
_KNOTS = (-2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


@torch.no_grad()
def init_micro_network(
    first: nn.Module, second: nn.Module, third: nn.Module, kernel_size: int, anchor_scale: float
) -> None:
    """Make the three 1x1 layers compute the analytic offsets of a box; nothing is fixed.

    Ours. The first layer holds the positive and the negative part of dx and dy, and a ReLU at each
    knot of dw and dh; the second one passes the former on and adds the latter up to exp(dw) and
    exp(dh), interpolated linearly; the third one is linear in these. The units that are left over
    keep their weights, but for those that lead to the results above. Offsets are those of
    ``box_offsets`` within 0.04 cells for dw and dh in [-1, 1]; boxes below e^-2 of the anchor count
    as so large, and those above e^1.5 are underestimated.

    Args:
        first, second, third: convolutions 4 -> at least 28 -> at least 6 -> 2 k^2, ReLUs between.
        kernel_size: k.
        anchor_scale: side of the anchors in cells.

    Raises:
        ValueError: a layer is too narrow.
    """
    knots = torch.tensor(_KNOTS)
    count = len(_KNOTS)
    if first.out_channels < 4 + 2 * count or second.out_channels < 6:
        raise ValueError(
            f"the offsets of a box need {4 + 2 * count} and 6 hidden channels, got "
            f"{first.out_channels} and {second.out_channels}"
        )
    # rows: dx+, dx-, dy+, dy-, knots of dw, knots of dh
    weight = torch.zeros(4 + 2 * count, 4)
    weight[0, 0] = weight[2, 1] = 1.0
    weight[1, 0] = weight[3, 1] = -1.0
    weight[4 : 4 + count, 2] = weight[4 + count :, 3] = 1.0
    _set(first, weight, torch.cat((torch.zeros(4), -knots, -knots)))

    # rows: dx+, dx-, dy+, dy-, exp(dw), exp(dh)
    slopes = knots.exp().diff() / knots.diff()
    bends = torch.cat((slopes[:1], slopes.diff(), knots.new_zeros(1)))
    weight = torch.zeros(6, second.in_channels)
    weight[:4, :4] = torch.eye(4)
    weight[4, 4 : 4 + count] = weight[5, 4 + count : 4 + 2 * count] = bends
    _set(second, weight, torch.cat((torch.zeros(4), knots[:1].exp().expand(2))))

    # rows: dy and dx of each tap; see ``box_offsets``
    taps = torch.arange(kernel_size, dtype=weight.dtype)
    part = anchor_scale * ((taps + 0.5) / kernel_size - 0.5)
    grid = taps - (kernel_size - 1) / 2
    rows, columns = taps.long().repeat_interleave(kernel_size), taps.long().repeat(kernel_size)
    weight = third.weight.flatten(1).clone()
    weight[:, :6] = 0.0
    for channel, axis, index in ((0, 1, rows), (1, 0, columns)):
        weight[channel::2, 2 * axis] = anchor_scale
        weight[channel::2, 2 * axis + 1] = -anchor_scale
        weight[channel::2, 4 + axis] = part[index]
    _set(third, weight, -torch.stack((grid[rows], grid[columns]), dim=1).flatten())


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Overwrite the first rows of a 1x1 convolution."""
    layer.weight[: len(weight)] = weight[:, :, None, None]
    layer.bias[: len(bias)] = bias
