"""Where the localisation terms pull a box that lies beside its object, and how strongly."""

from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor
from torch.nn import functional as F

from kd_d2.modeling.layers.box_crop import crop_boxes

from .kd_loc import Features, pooled_views, target_views

__all__ = ["BOX_LOSS", "BoxPull", "displaced", "pull_of_boxes"]

# Name of the detector's own loss among the terms.
BOX_LOSS = "box loss"


class BoxPull(NamedTuple):
    """What one term does to n boxes, without weight. Lengths are in units of each box's sides.

    Attributes:
        value: (n,) of the term.
        gradient: (n,) norm of its gradient with respect to the four coordinates.
        cosine: (n,) between the negative gradient and the way to the annotated box; 0 without a
            gradient.
    """

    value: Tensor
    gradient: Tensor
    cosine: Tensor


def displaced(gt_boxes: Tensor, distance: float) -> Tensor:
    """Return the boxes (M, 4), each moved in a random direction of its four coordinates.

    Args:
        gt_boxes: (M, 4), XYXY.
        distance: length of the way, where the width and the height of the box count 1.
    """
    ways = F.normalize(torch.randn_like(gt_boxes), dim=1)
    return gt_boxes + distance * ways * _sides(gt_boxes)


def pull_of_boxes(
    images: Tensor,
    image_sizes: Sequence[Tuple[int, int]],
    gt_boxes: List[Tensor],
    boxes: List[Tensor],
    *,
    pools: Mapping[str, int],
    size: int,
    chunk: int,
    features: Optional[Features] = None,
) -> Dict[str, BoxPull]:
    """Return what each compared view of DICOD, and SSD's box loss for comparison, do to boxes.

    The box loss is SSD's smooth L1 of deltas with the weights (10, 10, 5, 5), beta 1, of a default
    box that lies as the annotated one does. All are sums over the coordinates and means over the
    boxes in a training step, so that values and gradients of single boxes compare.

    Args:
        images: (N, 3, H, W), normalised and padded.
        image_sizes: per image (height, width) without the padding.
        gt_boxes: per image (n_i, 4), XYXY in pixels.
        boxes: as many, in the same order.
        pools: view -> cells a side, as in :func:`.kd_loc.localisation_loss`.
        size: side of the crops, pixels.
        chunk: most crops of annotated boxes at once.
        features: of the classifier; not called if ``pools`` has no layer.

    Returns:
        view or :data:`BOX_LOSS` -> :class:`BoxPull` of all n boxes in order.
    """
    target_crops = crop_boxes(images, gt_boxes, size, image_sizes)
    targets = target_views(target_crops, pools, chunk, features)
    counts = [len(b) for b in boxes]
    truth = torch.cat(gt_boxes)
    found = torch.cat(boxes).detach().requires_grad_()
    views = pooled_views(
        crop_boxes(images, list(found.split(counts)), size, image_sizes), pools, features
    )
    values = {view: (views[view] - targets[view]).abs().mean(dim=(1, 2, 3)) for view in pools}
    deltas = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).get_deltas(truth, found)
    values[BOX_LOSS] = F.smooth_l1_loss(
        deltas, torch.zeros_like(deltas), reduction="none", beta=1.0
    ).sum(dim=1)
    sides = _sides(truth)
    way = (truth - found.detach()) / sides
    pulls = {}
    for name, value in values.items():
        (gradient,) = torch.autograd.grad(value.sum(), found, retain_graph=True)
        gradient = gradient * sides
        cosine = F.cosine_similarity(-gradient, way, dim=1)
        pulls[name] = BoxPull(value.detach(), gradient.norm(dim=1), cosine)
    return pulls


def _sides(boxes: Tensor) -> Tensor:
    """(M, 4): width, height, width, height."""
    return (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
