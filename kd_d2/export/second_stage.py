"""What a second stage does with proposals: pooling, and detections of every class."""

from typing import List, Tuple

import torch
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor

from .graph import NONE, clip
from .suppression import Suppress

__all__ = ["detections_of_classes", "pool"]


def pool(pooler: ROIPooler, features: List[Tensor], boxes: Tensor) -> Tensor:
    """What ``pooler`` returns for the boxes of all images.

    Args:
        pooler: of Detectron2.
        features: (N, C, H, W) per level.
        boxes: (N, P, 4).

    Returns:
        (N * P, C, h, w).
    """
    images = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)
    rois = torch.cat((images[:, None, None].expand(-1, boxes.shape[1], 1), boxes), dim=2)
    rois = rois.flatten(0, 1)
    if len(pooler.level_poolers) == 1:
        return pooler.level_poolers[0](features[0], rois)
    levels = assign_boxes_to_levels(
        [Boxes(rois[:, 1:])],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
    rows = [(levels == i).nonzero().flatten() for i in range(len(pooler.level_poolers))]
    pooled = [
        level_pooler(feature, rois[index])
        for level_pooler, feature, index in zip(pooler.level_poolers, features, rows)
    ]
    # Sorting the row numbers says where each row has come to lie.
    return torch.cat(pooled)[torch.cat(rows).argsort()]


def detections_of_classes(
    boxes: Tensor,
    scores: Tensor,
    valid: Tensor,
    size: Tuple[int, int],
    suppress: Suppress,
    *,
    score_thresh: float,
    nms_thresh: float,
    limit: int,
) -> Tuple[Tensor, Tensor, Tensor]:
    """``fast_rcnn_inference`` of all images together, before the best ones are taken.

    Args:
        boxes: (N, P, G, 4), with G = 1 or, if each class has its own boxes, G = K.
        scores: (N, P, K), without the background.
        valid: bool (N, P), which proposals are not padding.
        size: (height, width) that boxes are clipped to.
        suppress: see :mod:`.suppression`.
        score_thresh, nms_thresh: of the detector.
        limit: most detections of an image.

    Returns:
        (N, K * P, 4) boxes, (N, K * P) scores, :data:`NONE` where there is no detection, and int64
        (N, K * P) classes.
    """
    boxes = clip(boxes, size).transpose(1, 2)  # (N, G, P, 4)
    scores = scores.transpose(1, 2)  # (N, K, P)
    candidates = (scores > score_thresh) & valid[:, None]
    if boxes.shape[1] == 1:
        keep = suppress(boxes[:, 0], scores, candidates, nms_thresh, limit)
    else:
        # Every class of every image is a set of boxes of its own.
        keep = suppress(
            boxes.flatten(0, 1),
            scores.flatten(0, 1)[:, None],
            candidates.flatten(0, 1)[:, None],
            nms_thresh,
            limit,
        ).view_as(scores)
    scores = torch.where(keep, scores, torch.full_like(scores, NONE))
    classes = torch.arange(scores.shape[1], device=scores.device)[:, None].expand(scores.shape)
    boxes = boxes.expand(-1, scores.shape[1], -1, -1)
    return boxes.flatten(1, 2), scores.flatten(1), classes.flatten(1)
