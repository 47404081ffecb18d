"""What the refinement module asks of its anchors: one square per cell, in the cell's centre."""

from typing import List, Mapping

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn

__all__ = ["anchor_sides", "check_levels_and_centres"]


def check_levels_and_centres(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> None:
    """
    Args:
        input_shape: of all levels of the pyramid.

    Raises:
        ValueError: levels that the pyramid lacks, or anchors not in the centre of their cells.
    """
    in_features, offset = cfg.MODEL.RPN.IN_FEATURES, cfg.MODEL.ANCHOR_GENERATOR.OFFSET
    if not set(in_features) <= set(input_shape):
        raise ValueError(
            f"MODEL.RPN.IN_FEATURES is {list(in_features)}, but the backbone returns "
            f"{list(input_shape)}"
        )
    if offset != 0.5:
        raise ValueError(
            "MODEL.ANCHOR_GENERATOR.OFFSET must be 0.5, the centre of a cell in RoIAlign and "
            f"in the S-head's kernels, got {offset}"
        )


def anchor_sides(
    cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], anchor_generator: nn.Module
) -> List[float]:
    """Return the side of the anchors of each level in pixels, ``REFINE.BASE_SCALE`` strides.

    Args:
        input_shape: of all levels of the pyramid.
        anchor_generator: of the levels ``MODEL.RPN.IN_FEATURES``.

    Raises:
        ValueError: more than one anchor per cell, or one that is not such a square.
    """
    if set(anchor_generator.num_anchors) != {1}:
        raise ValueError(
            "MimicDet has one anchor per cell: MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS "
            f"must have one value per level, got {anchor_generator.num_anchors} anchors"
        )
    scale = cfg.MODEL.MIMICDET.REFINE.BASE_SCALE
    sides = [float(scale * input_shape[name].stride) for name in cfg.MODEL.RPN.IN_FEATURES]
    for side, anchors in zip(sides, anchor_generator.cell_anchors):
        lengths = anchors[:, 2:] - anchors[:, :2]
        if not torch.allclose(lengths, torch.full_like(lengths, side)):
            raise ValueError(
                f"MODEL.MIMICDET.REFINE.BASE_SCALE {scale} needs square anchors of {sides} "
                f"pixels, but MODEL.ANCHOR_GENERATOR has one of {lengths.tolist()}; set its SIZES "
                "to these numbers and ASPECT_RATIOS to [[1.0]]"
            )
    return sides
