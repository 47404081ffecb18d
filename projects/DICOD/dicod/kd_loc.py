"""Distillation of the localisation: the image under predicted and under annotated boxes (Sec. 3.2).

The gradient reaches the predicted boxes through the coordinates at which the image is read.
"""

from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kd_d2.modeling.layers.box_crop import crop_boxes

__all__ = ["OBJ", "Features", "localisation_loss", "pooled_views", "target_views"]

# Name of the pixels among the compared views; the others are layers of the classifier.
OBJ = "obj"

# crops (n, 3, S, S), layers -> layer -> (n, C, h, w); differentiable with respect to the crops
Features = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]


def pooled_views(
    crops: Tensor, pools: Mapping[str, int], features: Optional[Features]
) -> Dict[str, Tensor]:
    """Return what is compared: pixels and features of crops, averaged over few cells.

    Args:
        crops: (n, 3, S, S), n > 0.
        pools: view -> cells a side, of :data:`OBJ` and layers of the classifier.
        features: of the classifier; not called if ``pools`` has no layer.

    Returns:
        view -> (n, C, m, m), in the order of ``pools``.
    """
    layers = [view for view in pools if view != OBJ]
    maps = dict(features(crops, layers)) if layers else {}
    maps[OBJ] = crops
    return {view: F.adaptive_avg_pool2d(maps[view], pool) for view, pool in pools.items()}


@torch.no_grad()
def target_views(
    crops: Tensor, pools: Mapping[str, int], chunk: int, features: Optional[Features]
) -> Dict[str, Tensor]:
    """Return :func:`pooled_views` of crops (M, 3, S, S), M > 0, without a graph, by chunks."""
    with torch.autocast(crops.device.type, enabled=False):
        parts = [pooled_views(part, pools, features) for part in crops.split(chunk)]
        return {view: torch.cat([part[view] for part in parts]) for view in pools}


def localisation_loss(
    images: Tensor,
    boxes: List[Tensor],
    image_sizes: Sequence[Tuple[int, int]],
    targets: Mapping[str, Tensor],
    index: Tensor,
    *,
    pools: Mapping[str, int],
    size: int,
    chunk: int,
    features: Optional[Features],
) -> Dict[str, Tensor]:
    """Return the mean over the boxes of mean |view of the box - view of its target| (eqs. 10, 11).

    Chunks are recomputed in the backward pass if there are several, which bounds the memory by one
    of them. Autocast is off inside: pixels and coordinates are fp32.

    Args:
        images: (N, 3, H, W), the student's normalised and padded images.
        boxes: per image (n_i, 4) predicted boxes with their graph, XYXY in pixels; P in all.
        image_sizes: per image (height, width) without the padding.
        targets: view -> (M, C, m, m) of the M ground-truth boxes, see :func:`pooled_views`.
        index: (P,) target of every box.
        pools: view -> cells a side.
        size: side of the crops, pixels.
        chunk: most crops at once.
        features: of the frozen classifier; not called if ``pools`` has no layer.

    Returns:
        view -> scalar; 0 with a graph if there are no boxes.
    """
    number = len(index)
    with torch.autocast(images.device.type, enabled=False):
        if number == 0:
            return {view: torch.cat(boxes).float().sum() for view in pools}

        def differences(start: int) -> Tensor:
            """(views,) sums over the boxes of a chunk."""
            crops = crop_boxes(images, _rows(boxes, start, start + chunk), size, image_sizes)
            which = index[start : start + chunk]
            views = pooled_views(crops, pools, features)
            return torch.stack(
                [(views[v] - targets[v][which]).abs().mean(dim=(1, 2, 3)).sum() for v in pools]
            )

        parts = []
        for start in range(0, number, chunk):
            if number > chunk and torch.is_grad_enabled():
                part = checkpoint(differences, start, use_reentrant=False, preserve_rng_state=False)
            else:
                part = differences(start)
            parts.append(part)
        losses = torch.stack(parts).sum(dim=0) / number
        return dict(zip(pools, losses.unbind()))


def _rows(boxes: List[Tensor], start: int, end: int) -> List[Tensor]:
    """Rows ``start`` to ``end`` of all images, image by image."""
    result, before = [], 0
    for part in boxes:
        result.append(part[max(start - before, 0) : max(end - before, 0)])
        before += len(part)
    return result
