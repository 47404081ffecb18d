"""Where the alignment layer reads the map, in the image (Fig. 3)."""

from typing import List, NamedTuple

import torch
from detectron2.structures import Boxes
from torch import Tensor
from torchvision.ops import nms

from .cells import cell_positions, grid_sizes
from .mimicdet import MimicDet

__all__ = ["SamplingPoints", "image_points", "sampling_points", "share_inside"]


class SamplingPoints(NamedTuple):
    """The best adjusted boxes of one image, best first; pixels of the network's input."""

    boxes: Tensor
    """(R, 4), adjusted anchors, not clipped to the image."""
    scores: Tensor
    """(R,), probabilities of an object by the refinement module."""
    levels: Tensor
    """(R,) int64, 0 for the finest."""
    points: List[Tensor]
    """(k^2, 2) x and y per box, k the kernel size of its level."""


def image_points(offsets: Tensor, y: int, x: int, stride: int) -> Tensor:
    """Return the points in the image that the taps of one cell read, (k^2, 2) x and y.

    Tap (r, c) of cell (y, x) reads the map at (y + r - (k-1)/2 + dy, x + c - (k-1)/2 + dx), and
    the centre of cell (y, x) lies at ((x + 1/2) stride, (y + 1/2) stride).

    Args:
        offsets: (2k^2, H, W) of the level, see :mod:`.offsets`.
        y, x: the cell.
        stride: of the level, pixels.
    """
    offset = offsets[:, y, x].view(-1, 2)
    kernel_size = round(len(offset) ** 0.5)
    taps = torch.arange(kernel_size, dtype=offsets.dtype, device=offsets.device)
    taps = taps - (kernel_size - 1) / 2
    rows, columns = taps.repeat_interleave(kernel_size), taps.repeat(kernel_size)
    xs = x + 0.5 + columns + offset[:, 1]
    ys = y + 0.5 + rows + offset[:, 0]
    return stride * torch.stack((xs, ys), dim=1)


def share_inside(points: Tensor, box: Tensor) -> float:
    """Return the share of ``points``, (P, 2), inside of ``box``, (4,), its border included."""
    inside = (points >= box[:2]) & (points <= box[2:])
    return inside.all(dim=1).float().mean().item()


@torch.no_grad()
def sampling_points(model: MimicDet, record: dict, num_boxes: int) -> SamplingPoints:
    """Return the best ``num_boxes`` boxes of one image after NMS, with the points of their cells.

    Args:
        model: in eval mode; its S-head's offsets are shown.
        record: one of Detectron2's inputs.
        num_boxes: at most so many.
    """
    images = model.preprocess_image([record])
    features = model.pyramid(images.tensor, False)
    refined = model.refinement(images, features)
    levels = [features[name] for name in model.head_in_features]
    offsets = model.s_head.offsets(levels, refined.deltas)
    boxes = _suppressed(refined.proposals[0], model.refinement.nms_thresh)[:num_boxes]
    anchors = Boxes.cat(refined.anchors).tensor[boxes.anchor_index]
    deltas = torch.cat([x[0].flatten(1).T for x in refined.deltas])[boxes.anchor_index]
    cells = zip(*(x.tolist() for x in cell_positions(boxes.anchor_index, grid_sizes(levels))))
    strides = model.refinement.anchor_generator.strides
    return SamplingPoints(
        boxes=model.refinement.box2box_transform.apply_deltas(deltas.float(), anchors),
        scores=boxes.objectness_logits.sigmoid(),
        levels=boxes.level,
        points=[image_points(offsets[i][0], y, x, strides[i]) for i, y, x in cells],
    )


def _suppressed(boxes, threshold: float):
    """The boxes, best first, that overlap no better one by more than ``threshold``."""
    return boxes[nms(boxes.proposal_boxes.tensor, boxes.objectness_logits, threshold)]
