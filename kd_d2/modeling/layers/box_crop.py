"""Crops of boxes, resampled to a square, that can be differentiated with respect to the boxes."""

from typing import List, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_d2.losses.precision import full_precision

__all__ = ["crop_boxes"]


def crop_boxes(
    images: Tensor, boxes: List[Tensor], size: int, image_sizes: Sequence[Tuple[int, int]]
) -> Tensor:
    """Crops of size x size pixels under the boxes of all images, in the order of the boxes.

    The spatial transformer of DICOD (arXiv 2106.05209, eq. 8): cell j of a crop reads the
    continuous position x1 + (j + 1/2) (x2 - x1) / size, bilinearly, without antialiasing and
    without keeping the aspect ratio. Inside of the image this is RoIAlign(aligned, one sample a
    cell); beyond the border of the tensor it blends with zeros, where RoIAlign repeats the border.

    Boxes are clamped to their image, and a clamped side gets no gradient; of a box wholly outside,
    a line or a corner of the image is left. No image is copied. Autocast is off inside: a grid in
    half precision would be wrong by 0.16 pixels in an image 1333 wide.

    Args:
        images: (N, C, H, W), padded.
        boxes: per image (n_i, 4), XYXY in pixels; pixel i covers [i, i + 1].
        size: side of the crops.
        image_sizes: per image (height, width) without the padding.

    Returns:
        (sum n_i, C, size, size), fp32 or fp64; connected to ``boxes`` also where there are none.
    """
    with torch.autocast(images.device.type, enabled=False):
        images = full_precision(images)
        cells = torch.arange(size, dtype=images.dtype, device=images.device) + 0.5
        crops = [
            _crops(image, boxes_i.to(images.dtype), cells, image_size)
            for image, boxes_i, image_size in zip(images, boxes, image_sizes, strict=True)
        ]
        return torch.cat(crops)


def _crops(image: Tensor, boxes: Tensor, cells: Tensor, image_size) -> Tensor:
    """(n, C, S, S) of one image (C, H, W), by one grid of n * S rows."""
    n, channels, side = len(boxes), len(image), len(cells)
    x = _positions(boxes[:, 0::2], cells, image_size[1], image.shape[2])[:, None, :]
    y = _positions(boxes[:, 1::2], cells, image_size[0], image.shape[1])[:, :, None]
    # written out, not F.affine_grid: its matrix product loses digits where TF32 is allowed
    grid = torch.stack(torch.broadcast_tensors(x, y), dim=3).view(1, n * side, side, 2)
    sampled = F.grid_sample(image[None], grid, mode="bilinear", align_corners=False)
    return sampled.view(channels, n, side, side).transpose(0, 1)


def _positions(sides: Tensor, cells: Tensor, limit: int, padded: int) -> Tensor:
    """(n, S) sampled positions between the ``sides`` (n, 2) along an axis, -1..1 in the tensor."""
    low, high = sides.clamp(0, limit).split(1, dim=1)
    return 2 * (low + cells * ((high - low) / len(cells))) / padded - 1
