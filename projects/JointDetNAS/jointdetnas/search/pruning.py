"""One-shot pruning (Tables 2 and 5): many channels at once, by part or down to a complexity."""

from typing import Callable

from torch import nn

from ..channel_pruning import ChannelPruning
from ..cost import Size, backbone_cost, total
from ..space import Architecture
from ..surgery import bottom_up_of

__all__ = ["backbone_macs", "prune", "prune_to"]


def backbone_macs(architecture: Architecture, size: Size) -> int:
    """Multiply-adds of a backbone for one image of (width, height)."""
    return total(backbone_cost(architecture, size)).macs


def prune(
    model: nn.Module, percent: float, *, floor: float = 0.125, min_channels: int = 8
) -> nn.Module:
    """Copy of a student without a part of its rankable channels, those of least importance.

    Args:
        model: detector with a MorphResNet; is the root that the floor refers to.
        percent: part of the channels, in (0, 1).
        floor, min_channels: as in :class:`ChannelPruning`.

    Raises:
        ValueError: no channel may be removed.
    """
    architecture = bottom_up_of(model).architecture
    action = ChannelPruning(
        root=architecture, percent=percent, floor=floor, min_channels=min_channels
    )
    (choice,) = action.choices(architecture) or [None]
    if choice is None:
        raise ValueError(f"no channel of {architecture} may be removed")
    return action.apply(model, choice)


def prune_to(
    model: nn.Module, macs: int, size: Size, *, floor: float = 0.125, min_channels: int = 8
) -> nn.Module:
    """The same with the smallest part that leaves at most ``macs`` multiply-adds at ``size``.

    Found by bisection: what a larger part removes contains what a smaller one does.

    Raises:
        ValueError: it has no more than that already, or cannot be made so small.
    """
    architecture = bottom_up_of(model).architecture
    number = architecture.num_rankable_channels

    def cut(count: int) -> nn.Module:
        return prune(model, (count + 0.25) / number, floor=floor, min_channels=min_channels)

    def fits(network: nn.Module) -> bool:
        return backbone_macs(bottom_up_of(network).architecture, size) <= macs

    where = f"multiply-adds at {size[0]}x{size[1]}"
    if fits(model):
        raise ValueError(f"the backbone has no more than {macs:,} {where} as it is")
    smallest = cut(number - 1)
    if not fits(smallest):
        least = backbone_macs(bottom_up_of(smallest).architecture, size)
        raise ValueError(f"the floors leave at least {least:,} {where}, more than {macs:,}")
    return cut(_first(lambda count: fits(cut(count)), 1, number - 1))


def _first(good: Callable[[int], bool], low: int, high: int) -> int:
    """The least number for which a monotone condition holds; ``high`` is known to be one."""
    while low < high:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle + 1
    return low
