"""What the sums of CrossKD's losses are divided by.

Every function takes a :class:`~.regions.Positions` and the weights (N, R) of the loss, and returns
a positive scalar tensor. Those that average over ranks are collective: they run on every rank in
every step.
"""

from typing import Callable, Dict

import torch

from kd_d2.modeling.layers import centerness, reduce_mean

__all__ = ["NORMALISERS"]


def positives_local(positions, weights) -> torch.Tensor:
    """P = sum over images of max(number of positives, 1), of this rank."""
    return positions.positive.sum(dim=1).clamp(min=1).sum().float()


def positives_mean(positions, weights) -> torch.Tensor:
    """P averaged over ranks."""
    return reduce_mean(positives_local(positions, weights))


def weights_local(positions, weights) -> torch.Tensor:
    """Sum of the weights of this rank; at least 1e-6."""
    return weights.detach().sum().clamp(min=1e-6)


def centerness_mean(positions, weights) -> torch.Tensor:
    """D = sum of the centerness targets of the positives, averaged over ranks; at least 1.

    The official floor of 1e-6 would multiply the losses by a million when a batch has no positive.
    """
    anchors = positions.anchors.expand_as(positions.boxes)[positions.positive]
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    boxes = positions.boxes[positions.positive]
    distances = torch.cat((centers - boxes[:, :2], boxes[:, 2:] - centers), dim=1)
    return reduce_mean(centerness(distances).sum()).clamp(min=1.0)


def region(positions, weights) -> torch.Tensor:
    """|S| of eq. 4 and 5: number of positions with a weight, of this rank; at least 1."""
    return (weights > 0).sum().clamp(min=1).float()


def ema(positions, weights) -> torch.Tensor:
    """The student's own moving average of positives (Detectron2's RetinaNet and FCOS)."""
    value = getattr(positions.model, "loss_normalizer", None)
    if value is None:
        raise ValueError(
            f'KD.CROSSKD.NORMALIZER "ema": {type(positions.model).__name__} keeps no moving '
            'average of its positives; use "official" or "region"'
        )
    return torch.as_tensor(float(value), device=positions.positive.device)


NORMALISERS: Dict[str, Callable] = {
    f.__name__: f
    for f in (positives_local, positives_mean, weights_local, centerness_mean, region, ema)
}
