"""IoU of pairs of boxes."""

import torch
from torch import Tensor

__all__ = ["paired_iou"]


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each box with its partner.

    Args:
        boxes, others: (..., 4) XYXY, shapes that broadcast against each other. At least one box
            of each pair has an area above 0.

    Returns:
        (...) in [0, 1].
    """
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    overlap = (high - low).clamp(min=0).prod(dim=-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)
    other_areas = (others[..., 2:] - others[..., :2]).prod(dim=-1)
    # Rounding can lift the quotient of equal boxes above 1.
    return (overlap / (areas + other_areas - overlap)).clamp(max=1)
