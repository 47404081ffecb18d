"""Quality focal loss, the classification loss of GFL and of CrossKD."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["quality_focal_loss"]


def quality_focal_loss(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    detach_targets: bool = True,
) -> Tensor:
    """Binary cross-entropy with soft targets, modulated by the distance to the target.

    QFL(x, t) = |sigma(x) - t|^gamma * BCE(sigma(x), t), eq. 4 of Generalized Focal Loss (Li et
    al., NeurIPS 2020), where the exponent is called beta. The modulating factor is part of the
    graph. For x = 0, t = 0.75, gamma = 1: 0.25 * ln 2 = 0.173287.

    Computed in fp32 with autocast off.

    Args:
        logits: any shape, predictions before the sigmoid.
        targets: same shape, soft labels in [0, 1]: per class, 0 for all classes but the true one
            in a detector, the sigmoid of a second network's logits in distillation.
        gamma: exponent, 0 (plain cross-entropy) or at least 1.
        reduction: "none", "mean" (over all elements, 0 when there are none) or "sum".
        detach_targets: the gradient reaches ``logits`` only.

    Returns:
        fp32 tensor of the shape of ``logits``, or a scalar.

    Raises:
        ValueError: shapes differ, or ``gamma`` or ``reduction`` is not one of the above.
    """
    if logits.shape != targets.shape:
        raise ValueError(
            f"logits and targets must have one shape, got {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if gamma < 0 or 0 < gamma < 1:  # in between, the slope is infinite where x meets t
        raise ValueError(f"gamma must be 0 or at least 1, got {gamma}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')
    with torch.autocast(logits.device.type, enabled=False):
        targets = targets.detach() if detach_targets else targets
        logits, targets = logits.float(), targets.float()
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        if gamma > 0:
            loss = loss * (logits.sigmoid() - targets).abs().pow(gamma)
        if reduction == "mean":
            return loss.sum() / max(loss.numel(), 1)
        return loss.sum() if reduction == "sum" else loss
