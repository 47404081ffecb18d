"""Order of a supernet's channels: what is read with the largest weights comes first.

A subnet keeps the leading channels of every layer, hence the important ones should lead. Once-for-
All sorts the channels between the convs of a block; here streams, stem, pyramid and RPN are sorted,
too (ours). Every sort is a permutation that is undone by its readers: the supernet computes what it
did before, up to the order of summation.
"""

from dataclasses import dataclass
from typing import List, Sequence, Tuple

import torch
from torch import Tensor, nn

from .subnet import QUARTERS
from .supernet import Supernet

__all__ = ["ChannelGroup", "channel_groups", "sort_channels"]


@dataclass
class ChannelGroup:
    """Channels that have one order in all layers that write or read them.

    Args:
        name: for messages.
        standard: number of channels at the standard width.
        writers: convs whose outputs they are.
        readers: convs and linear layers whose inputs they are; a linear layer may read several
            numbers of each channel, one behind the other.
    """

    name: str
    standard: int
    writers: List[nn.Module]
    readers: List[nn.Module]

    @property
    def width(self) -> int:
        return self.writers[0].weight.shape[0]

    def importance(self) -> Tensor:
        """(width,) L1 norm of the weights that read each channel, over all readers."""
        return sum(_inputs(r, self.width).abs().double().sum(dim=(0, 2)) for r in self.readers)

    def permute(self, order: Tensor) -> None:
        """Let the channel ``order[i]`` (int64) become channel ``i``."""
        for writer in self.writers:
            for tensor in _outputs(writer):
                tensor.copy_(tensor[order])
        for reader in self.readers:
            inputs = _inputs(reader, self.width)
            inputs.copy_(inputs[:, order])


def _inputs(reader: nn.Module, channels: int) -> Tensor:
    """Weight as (outputs, channels, numbers of a channel), a view."""
    return reader.weight.data.view(reader.weight.shape[0], channels, -1)


def _outputs(writer: nn.Module) -> List[Tensor]:
    """All tensors of the layer, its norm included, with an entry a channel."""
    tensors = [writer.weight, writer.bias]
    norm = getattr(writer, "norm", None)
    if norm is not None:
        tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return [tensor.data for tensor in tensors if tensor is not None]


def channel_groups(supernet: Supernet) -> List[ChannelGroup]:
    """Return all groups of channels of the supernet; every elastic dimension is in one."""
    model, geometry = supernet.model, supernet.geometry
    fpn, rpn = model.backbone, model.proposal_generator.rpn_head
    stages = list(fpn.bottom_up.stages)
    laterals = list(reversed(fpn.lateral_convs))  # fine to coarse
    groups = [ChannelGroup("stem", geometry.stem, [fpn.bottom_up.stem.conv1], _entry(stages[0]))]
    for index, stage in enumerate(stages):
        inner = geometry.inner << index
        for number, block in enumerate(stage):
            name = f"res{index + 2}.{number}"
            groups.append(ChannelGroup(f"{name}.conv1", inner, [block.conv1], [block.conv2]))
            groups.append(ChannelGroup(f"{name}.conv2", inner, [block.conv2], [block.conv3]))
        readers = [block.conv1 for block in list(stage)[1:]] + [laterals[index]]
        if index + 1 < len(stages):
            readers += _entry(stages[index + 1])
        writers = [stage[0].shortcut] + [block.conv3 for block in stage]
        groups.append(ChannelGroup(f"res{index + 2}", geometry.outer << index, writers, readers))
    outputs, fc1 = list(fpn.output_convs), model.roi_heads.box_head.fc1
    neck = geometry.neck
    groups.append(ChannelGroup("fpn_lateral", neck, laterals, outputs))
    groups.append(ChannelGroup("fpn_output", neck, outputs, [rpn.conv, fc1]))
    groups.append(
        ChannelGroup("rpn.conv", neck, [rpn.conv], [rpn.objectness_logits, rpn.anchor_deltas])
    )
    return groups


def _entry(stage: nn.Module) -> List[nn.Module]:
    """What reads the input of a stage."""
    return [stage[0].conv1, stage[0].shortcut]


@torch.no_grad()
def sort_channels(supernet: Supernet, keep_widths: Sequence[int] = ()) -> int:
    """Sort every group by falling importance, and return how many channels moved.

    Args:
        supernet: changed in place.
        keep_widths: quarters; channels stay within the segments between these widths, so that the
            subnets of these widths keep their channels and compute what they did.

    Raises:
        ValueError: such a width is no smaller than the supernet's.
    """
    keep = tuple(keep_widths)
    if any(not 1 <= width < supernet.geometry.max_width for width in keep):
        raise ValueError(
            "MODEL.ELASTIC_RESNET.SORT_KEEP_WIDTHS must lie below MAX_WIDTH "
            f"({supernet.geometry.max_width}), got {keep}"
        )
    moved = 0
    for group in channel_groups(supernet):
        borders = [0, *sorted(group.standard * w // QUARTERS for w in keep), group.width]
        order = _order(group.importance(), list(zip(borders, borders[1:])))
        group.permute(order)
        moved += int((order != torch.arange(len(order), device=order.device)).sum())
    return moved


def _order(importance: Tensor, segments: Sequence[Tuple[int, int]]) -> Tensor:
    """Indices by falling importance within each segment; equals keep their order."""
    return torch.cat(
        [importance[low:high].argsort(descending=True, stable=True) + low for low, high in segments]
    )
