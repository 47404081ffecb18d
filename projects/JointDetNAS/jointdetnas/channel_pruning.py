"""Channel pruning: the channels with the smallest batch-norm weights go."""

from typing import Dict, List, NamedTuple, Sequence, Tuple, Union

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from .actions import STUDENT_ACTIONS, Action, StudentAction
from .morph_resnet import MorphResNet
from .space import Architecture, Position
from .surgery import InnerKey, bottom_up_of, kept_indices, select_channels

__all__ = ["ChannelPruning", "least_important"]

# A conv inside a block, or the number of a stream.
Target = Union[InnerKey, int]


class _Ranked(NamedTuple):
    """Channels that are kept or removed together: one channel, or one group of a grouped conv.

    The order of the fields is that of the ranking: equal magnitudes by stage, block, conv, index.
    """

    magnitude: float
    place: Tuple[int, int, int, int]
    targets: Tuple[Target, ...]
    channels: Tuple[int, ...]


def least_important(
    ranked: Sequence[_Ranked], widths: Dict[Target, int], floors: Dict[Target, int], quota: int
) -> Dict[Target, List[int]]:
    """The first ``quota`` entries of the ascending list that leave every width at its floor.

    Args:
        ranked: entries in any order.
        widths, floors: channels of every target now, and at least.
        quota: number of entries to remove.

    Returns:
        target -> channels to remove; fewer than ``quota`` if the floors do not allow more.
    """
    left = dict(widths)
    removed: Dict[Target, List[int]] = {}
    count = 0
    for entry in sorted(ranked, key=lambda e: (e.magnitude, e.place)):
        if count == quota:
            break
        size = len(entry.channels)
        if any(left[target] - size < floors[target] for target in entry.targets):
            continue
        for target in entry.targets:
            left[target] -= size
            removed.setdefault(target, []).extend(entry.channels)
        count += 1
    return removed


@STUDENT_ACTIONS.register()
class ChannelPruning(StudentAction):
    """Network slimming (Liu et al., ICCV 2017) over the whole backbone, in small steps.

    One global ranking by |gamma|, raw magnitudes. The keys are the batch norms of all convs of a
    block but the last (appendix A.3: "the two BN modules at the middle"), and of projections, for
    the channels of the streams they start. The last batch norm of a block is no key. A stream that
    starts at the stem cannot be pruned. Around a grouped conv whole groups are ranked, by the mean
    over the channels of both convs.
    """

    name = "ChannelPruning"

    @configurable
    def __init__(self, *, root: Architecture, percent: float, floor: float, min_channels: int):
        """
        Args:
            root: architecture of the base detector, whose widths the floor is a part of.
            percent: part of the rankable channels that one action removes, in (0, 1).
            floor: least width, as part of that of the root's block in the same place.
            min_channels: least width in channels.

        Raises:
            ValueError: a number is out of its range.
        """
        if not 0 < percent < 1:
            raise ValueError(f"SEARCH.CHANNEL_PRUNING.PERCENT must be in (0, 1), got {percent}")
        if not 0 <= floor < 1:
            raise ValueError(f"SEARCH.CHANNEL_PRUNING.FLOOR must be in [0, 1), got {floor}")
        if min_channels < 1:
            raise ValueError(
                f"SEARCH.CHANNEL_PRUNING.MIN_CHANNELS must be positive, got {min_channels}"
            )
        self.root = root
        self.percent = percent
        self.floor = floor
        self.min_channels = min_channels

    @classmethod
    def from_config(cls, cfg, root: Architecture):
        node = cfg.SEARCH.CHANNEL_PRUNING
        return {
            "root": root,
            "percent": node.PERCENT,
            "floor": node.FLOOR,
            "min_channels": node.MIN_CHANNELS,
        }

    def choices(self, architecture: Architecture) -> List[Action]:
        widths, floors = _widths(architecture), self.floors(architecture)
        above = any(
            widths[target] - unit >= floors[target] for target, unit in _units(architecture).items()
        )
        return [Action(self.name)] if above else []

    def floors(self, architecture: Architecture) -> Dict[Target, int]:
        """Least width of every conv and stream that may be pruned."""
        result: Dict[Target, int] = {}
        for target in _widths(architecture):
            stage, index, conv = _place(architecture, target)
            blocks = self.root.stages[stage]
            width = blocks[min(index, len(blocks) - 1)].channels[conv]
            result[target] = max(self.min_channels, int(width * self.floor))
        return result

    def apply(self, model: nn.Module, action: Action, images: Sequence[Tensor] = ()) -> nn.Module:
        """See the base class.

        Raises:
            ValueError: a batch norm has no trainable weight (FrozenBN).
        """
        body = bottom_up_of(model)
        ranked = rank_channels(body)
        widths = _widths(body.architecture)
        quota = round(self.percent * len(ranked))
        removed = least_important(ranked, widths, self.floors(body.architecture), quota)
        kept = {target: kept_indices(widths[target], gone) for target, gone in removed.items()}
        return select_channels(
            model,
            inner={t: k for t, k in kept.items() if isinstance(t, tuple)},
            streams={t: k for t, k in kept.items() if not isinstance(t, tuple)},
        )


def _units(architecture: Architecture) -> Dict[Target, int]:
    """Prunable convs and streams -> channels that go at once: 1, or the width of a group."""
    result: Dict[Target, int] = {}
    for position in architecture.positions:
        block = architecture.block(position)
        unit = block.channels[0] // block.groups if block.groups > 1 else 1
        result.update({(*position, conv): unit for conv in range(len(block.channels) - 1)})
    for number, stream in enumerate(architecture.streams):
        if stream.source is not None:
            result[number] = 1
    return result


def _widths(architecture: Architecture) -> Dict[Target, int]:
    return {
        target: (
            architecture.block(target[:2]).channels[target[2]]
            if isinstance(target, tuple)
            else architecture.streams[target].width
        )
        for target in _units(architecture)
    }


def _place(architecture: Architecture, target: Target) -> Tuple[int, int, int]:
    """Stage, block and conv; a stream stands at its source, after the convs before the last."""
    if isinstance(target, tuple):
        return target
    source = architecture.streams[target].source
    assert source is not None
    return (*source, len(architecture.block(source).channels) - 1)


def rank_channels(body: MorphResNet) -> List[_Ranked]:
    """Importance of everything that can be removed, in no particular order.

    Raises:
        ValueError: a batch norm has no trainable weight.
    """
    architecture = body.architecture
    result: List[_Ranked] = []
    for position in architecture.positions:
        result += _rank_block(body, position)
    for number, stream in enumerate(architecture.streams):
        if stream.source is None:
            continue
        place = _place(architecture, number)
        gamma = _magnitudes(body.block_at(stream.source).shortcut.norm, place)
        result += [
            _Ranked(value, (*place, index), (number,), (index,))
            for index, value in enumerate(gamma.tolist())
        ]
    return result


def _rank_block(body: MorphResNet, position: Position) -> List[_Ranked]:
    block = body.architecture.block(position)
    inner = range(len(block.channels) - 1)
    gammas = [
        _magnitudes(conv.norm, (*position, index))
        for index, conv in zip(inner, body.block_at(position).convs)
    ]
    if block.groups == 1:
        return [
            _Ranked(value, (*position, conv, index), ((*position, conv),), (index,))
            for conv, gamma in zip(inner, gammas)
            for index, value in enumerate(gamma.tolist())
        ]
    size = block.channels[0] // block.groups
    means = torch.stack(gammas).mean(0).view(block.groups, size).mean(1)
    return [
        _Ranked(
            value,
            (*position, 0, group),
            tuple((*position, conv) for conv in inner),
            tuple(range(group * size, (group + 1) * size)),
        )
        for group, value in enumerate(means.tolist())
    ]


def _magnitudes(norm: nn.Module, place: Tuple[int, ...]) -> Tensor:
    if not isinstance(getattr(norm, "weight", None), nn.Parameter):
        raise ValueError(
            f"channels cannot be ranked: the norm at (stage, block, conv) {place}, from 0, has no "
            "trainable weight. Set MODEL.RESNETS.NORM to 'BN' or 'SyncBN' and "
            "MODEL.BACKBONE.FREEZE_AT to 0"
        )
    return norm.weight.detach().abs()
