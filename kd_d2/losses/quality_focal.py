"""Quality focal loss, the classification loss of GFL and of CrossKD."""

import math
from typing import Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kd_d2.losses.precision import full_precision

__all__ = ["quality_focal_loss", "quality_focal_loss_per_row"]


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


def quality_focal_loss_per_row(logits: Tensor, target_logits: Tensor, gamma: float) -> Tensor:
    """QFL(x, sigma(t)) summed over the last dimension, for distillation on many classes.

    The value and the gradient of ``quality_focal_loss(x, t.sigmoid(), gamma).sum(-1)`` up to
    rounding. The gradient is computed with the value, in blocks that stay in a processor's cache,
    so that one map of the size of ``logits`` is all that is kept for the backward pass.

    With p = sigma(x), q = sigma(t), d = p - q and B the cross-entropy,

        dQFL/dx = gamma |d|^(gamma - 1) sign(d) p (1 - p) B + |d|^gamma d.

    Args:
        logits: (..., K).
        target_logits: (..., K), a constant: no gradient reaches it.
        gamma: as in :func:`quality_focal_loss`.

    Returns:
        (...), fp32 or fp64.

    Raises:
        ValueError: shapes differ, or ``gamma`` is neither 0 nor at least 1.
    """
    if logits.shape != target_logits.shape:
        raise ValueError(
            f"logits and target_logits must have one shape, got {tuple(logits.shape)} and "
            f"{tuple(target_logits.shape)}"
        )
    if gamma < 0 or 0 < gamma < 1:
        raise ValueError(f"gamma must be 0 or at least 1, got {gamma}")
    with torch.autocast(logits.device.type, enabled=False):
        return _PerRow.apply(full_precision(logits), target_logits.detach(), float(gamma))


# elements of a block: small enough for a processor's caches
_BLOCK = 2**17


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target_logits: Tensor, gamma: float) -> Tensor:
        rows, classes = math.prod(logits.shape[:-1]), logits.shape[-1]
        x, t = logits.reshape(rows, classes), target_logits.reshape(rows, classes)
        # a GPU wants few kernels instead
        step = max(_BLOCK // max(classes, 1), 1) if x.device.type == "cpu" else max(rows, 1)
        needed = ctx.needs_input_grad[0]
        losses = x.new_empty(rows)
        gradient = x.new_empty(x.shape) if needed else None
        for start in range(0, rows, step):
            block = slice(start, start + step)
            out = gradient[block] if needed else None
            losses[block] = _values(x[block], t[block].to(x.dtype), gamma, out).sum(dim=-1)
        if needed:
            ctx.save_for_backward(gradient.view(logits.shape))
        return losses.view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * grad[..., None], None, None


def _values(x: Tensor, t: Tensor, gamma: float, gradient: Optional[Tensor]) -> Tensor:
    """QFL of each element; ``gradient``, if given, receives the derivatives."""
    p, q = x.sigmoid(), t.sigmoid()
    entropy = (1 - q).mul_(x).sub_(F.logsigmoid(x))
    d = p - q
    if gamma == 0:
        if gradient is not None:
            gradient.copy_(d)
        return entropy
    distance = d.abs()
    factor = distance if gamma == 1 else distance.pow(gamma)
    if gradient is not None:
        slope = p.sub_(p * p).mul_(entropy)
        if gamma != 1:
            slope.mul_(distance.pow(gamma - 1)).mul_(gamma)
        torch.mul(factor, d, out=gradient)
        gradient.addcmul_(slope, d.sgn_())
    return entropy.mul_(factor)
