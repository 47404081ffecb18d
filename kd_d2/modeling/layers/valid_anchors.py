"""Which anchors of a padded batch belong to an image."""

from typing import List, Sequence, Tuple

import torch
from detectron2.structures import Boxes
from torch import Tensor

__all__ = ["valid_anchor_mask"]


@torch.no_grad()
def valid_anchor_mask(
    anchors: List[Boxes],
    strides: Sequence[int],
    image_size: Tuple[int, int],
    size_divisibility: int,
    offset: float = 0.0,
) -> Tensor:
    """Marks the anchors of the cells that the image would have without the rest of its batch.

    A cell is valid if row < ceil(h / stride) and column < ceil(w / stride), h and w being the
    image's own size rounded up to ``size_divisibility``: padding to the batch's largest image is
    excluded, padding that the backbone needs is not (rule of the official CrossKD detectors).

    Args:
        anchors: per level (Ri, 4) XYXY in absolute pixels, centred on their cell's reference
            point (column + offset, row + offset) * stride.
        strides: of the levels, pixels.
        image_size: (height, width) of the image before padding.
        size_divisibility: of the backbone; 0 counts as 1.
        offset: of the anchor generator, in strides.

    Returns:
        bool (R,), over all levels, R = sum of Ri.
    """
    step = max(size_divisibility, 1)
    height, width = (-(-int(side) // step) * step for side in image_size)
    masks = []
    for boxes, stride in zip(anchors, strides):
        columns, rows = (boxes.get_centers() / stride - offset).unbind(dim=1)
        # Cell numbers are integers up to rounding, so half a cell is a safe bound.
        masks.append((columns < -(-width // stride) - 0.5) & (rows < -(-height // stride) - 0.5))
    return torch.cat(masks)
