"""Multiply-adds, parameters and latency of a student, in the paper's convention and in fvcore's.

Both count one per multiply-add of convs and linear layers. The paper's FLOPs (its tables do not say
so, but its numbers follow) add: 1 per output for a bias, 2 per element of a batch norm, 1 per
element of a ReLU, and 1 per input element of a max-pooling. They are counted on the size of the
image itself, while Detectron2 pads images to multiples of 32.
"""

import statistics
from dataclasses import dataclass
from typing import Dict, List, Sequence, Tuple

import torch
from torch import nn

from kd_d2.analysis import interleaved

from .space import Architecture
from .surgery import evaluating

__all__ = ["Cost", "backbone_cost", "detector_cost", "latency", "total"]

# Width and height in pixels, as in the paper: (1333, 800).
Size = Tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """What one image costs.

    Args:
        macs: multiply-adds of convs and linear layers, which is what fvcore counts as flops.
        flops: the paper's convention; ``macs`` and the elementwise operations.
        parameters: weights and biases, those of batch norms included.
    """

    macs: int = 0
    flops: int = 0
    parameters: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.macs + other.macs, self.flops + other.flops, self.parameters + other.parameters
        )


def total(costs: Dict[str, Cost]) -> Cost:
    """Sum over all modules."""
    return sum(costs.values(), Cost())


def _half(size: Size) -> Size:
    """Size after a conv or pooling of stride 2 with the usual padding."""
    return -(-size[0] // 2), -(-size[1] // 2)


def _conv(
    inputs: int,
    outputs: int,
    kernel: int,
    size: Size,
    *,
    groups: int = 1,
    norm: bool = False,
    relu: bool = False,
) -> Cost:
    """Cost of a conv with output of ``size``; with batch norm or else with a bias."""
    elements = outputs * size[0] * size[1]
    weights = outputs * (inputs // groups) * kernel * kernel
    macs = weights * size[0] * size[1]
    elementwise = (2 if norm else 1) * elements + (elements if relu else 0)
    return Cost(macs, macs + elementwise, weights + (2 if norm else 1) * outputs)


def backbone_cost(architecture: Architecture, size: Size) -> Dict[str, Cost]:
    """Cost by stage of a MorphResNet: "stem", "res2" to "res5".

    Args:
        architecture: widths of the stem and of all blocks.
        size: (width, height) of the image; of any parity, not padded.
    """
    size = _half(size)
    stem = _conv(3, architecture.stem, 7, size, norm=True, relu=True)
    pooling = architecture.stem * size[0] * size[1]
    costs = {"stem": stem + Cost(flops=pooling)}
    size = _half(size)
    for stage in range(len(architecture.stages)):
        cost = Cost()
        for index in range(architecture.depths[stage]):
            cost, size = _add_block(cost, architecture, (stage, index), size)
        costs[f"res{stage + 2}"] = cost
    return costs


def _add_block(cost: Cost, architecture: Architecture, position, size: Size) -> Tuple[Cost, Size]:
    block = architecture.block(position)
    inputs = architecture.in_channels(position)
    out_size = _half(size) if architecture.stride(position) == 2 else size
    if block.projection:
        cost += _conv(inputs, block.out_channels, 1, out_size, norm=True)
    # the last conv's ReLU comes after the addition, on a map of the same size
    kernels = (1, 3, 1) if block.is_bottleneck else (3, 3)
    strided = kernels.index(3)
    for index, (kernel, outputs) in enumerate(zip(kernels, block.channels)):
        at = size if index < strided else out_size
        groups = block.groups if index == strided else 1
        cost += _conv(inputs, outputs, kernel, at, groups=groups, norm=True, relu=True)
        inputs = outputs
    return cost, out_size


def detector_cost(
    architecture: Architecture,
    size: Size,
    *,
    fpn: int = 256,
    num_classes: int = 80,
    num_anchors: int = 3,
    pooler: int = 7,
    fc_dims: Sequence[int] = (1024, 1024),
    num_proposals: int = 1000,
) -> Dict[str, Cost]:
    """Cost by module of Faster R-CNN with a pyramid P2 to P6 above a MorphResNet.

    Pooling of regions, decoding of boxes and non-maximum suppression are not counted.

    Args:
        architecture: the backbone.
        size: (width, height) of the image, not padded.
        fpn: channels of the pyramid.
        num_classes: foreground classes; boxes are regressed for each of them.
        num_anchors: anchors per cell.
        pooler: side of a pooled region.
        fc_dims: widths of the box head's linear layers.
        num_proposals: regions that the box head sees.
    """
    costs = backbone_cost(architecture, size)
    at = _half(_half(size))
    sizes: List[Size] = []
    pyramid = Cost()
    for blocks in architecture.stages:
        sizes.append(at)
        pyramid += _conv(blocks[-1].out_channels, fpn, 1, at) + _conv(fpn, fpn, 3, at)
        at = _half(at)
    pyramid += Cost(flops=fpn * sizes[-1][0] * sizes[-1][1])  # P6 is a max-pooling of P5
    costs["fpn"] = pyramid
    # the RPN's weights are shared by all levels
    levels = [
        _conv(fpn, fpn, 3, level, relu=True) + _conv(fpn, 5 * num_anchors, 1, level)
        for level in [*sizes, at]
    ]
    rpn = sum(levels, Cost())
    costs["rpn"] = Cost(rpn.macs, rpn.flops, levels[0].parameters)
    head, inputs = Cost(), fpn * pooler * pooler
    for outputs in fc_dims:
        head += _conv(inputs, outputs, 1, (1, 1), relu=True)
        inputs = outputs
    head += _conv(inputs, num_classes + 1 + 4 * num_classes, 1, (1, 1))
    costs["box_head"] = Cost(head.macs * num_proposals, head.flops * num_proposals, head.parameters)
    return costs


@torch.no_grad()
def latency(model: nn.Module, size: Size, *, rounds: int = 20, warmup: int = 5) -> float:
    """Median seconds of one detection, batch size 1, on the device that the model is on.

    Args:
        model: a Detectron2 detector; is put into eval mode for the measurement.
        size: (width, height) of the image.
        rounds: measured detections.
        warmup: detections before.
    """
    image = torch.zeros(3, size[1], size[0], dtype=torch.uint8)
    inputs = [{"image": image, "height": size[1], "width": size[0]}]
    with evaluating(model):
        times = interleaved({"detection": lambda: model(inputs)}, rounds, warmup)
    return statistics.median(times["detection"])
