"""RoIAlign of every box on every level, or on the level of its size."""

from typing import List, Sequence, Tuple

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import convert_boxes_to_pooler_format
from detectron2.structures import Boxes
from torch import Tensor

from kd_d2.blocks import pyramid_pooler
from kd_d2.losses.precision import full_precision

__all__ = ["pool_all_levels", "pool_by_size"]


def pool_all_levels(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: List[Boxes],
    size: Tuple[int, int],
    sampling_ratio: int,
) -> Tensor:
    """Return (R, L, C, h, w): the features of all R boxes on each of the L levels, in fp32.

    Detectron2's ``ROIPooler`` gives a box one level; here is one RoIAlign (V2) per level.

    Args:
        features: (N, C, H, W) per level.
        strides: input pixels per cell of each level.
        boxes: one ``Boxes`` an image, absolute pixels of the padded input.
        size: (h, w).
        sampling_ratio: points per bin and direction; 0: as many as the bin has cells, which is
            without bound for a large box on a fine level.
    """
    rois = convert_boxes_to_pooler_format(boxes).detach()
    with torch.autocast(rois.device.type, enabled=False):
        return torch.stack(
            [
                ROIAlign(size, 1.0 / stride, sampling_ratio, aligned=True)(full_precision(x), rois)
                for x, stride in zip(features, strides)
            ],
            dim=1,
        )


def pool_by_size(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: List[Boxes],
    size: Tuple[int, int],
    sampling_ratio: int,
) -> Tensor:
    """Return (R, C, h, w): each box on the level of its size, as Detectron2's RoI heads pool it.

    That is the level of stride 2^k, k = floor(4 + log2(sqrt(area) / 224)) clamped to the levels.

    Args:
        features, strides, boxes, size, sampling_ratio: see :func:`pool_all_levels`; strides are
            consecutive powers of 2.
    """
    pooler = pyramid_pooler(strides, size, sampling_ratio)
    with torch.autocast(features[0].device.type, enabled=False):
        pooled = pooler([full_precision(x) for x in features], boxes)
    # without a box the pooler's result has no graph
    return pooled + sum(full_precision(x).flatten()[:0].sum() for x in features)
