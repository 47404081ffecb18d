"""Losses on box sides that are predicted as distributions over discrete distances."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["distribution_focal_loss"]


def distribution_focal_loss(logits: Tensor, targets: Tensor, reduction: str = "none") -> Tensor:
    """Cross-entropy that puts the mass of a distribution on the two bins next to the target.

    DFL = -((y_r - y) ln S_l + (y - y_l) ln S_r) with y_l = floor(y), y_r = y_l + 1 and S the
    softmax over the bins: eq. 6 of Generalized Focal Loss (Li et al., NeurIPS 2020). For logits
    (0, 0, ln 2, 0) and y = 2.3: 0.7 ln 2.5 + 0.3 ln 5 = 1.124235.

    Computed in fp32 with autocast off; the gradient reaches ``logits`` only.

    Args:
        logits: (..., n + 1), one bin per distance 0, 1, ..., n.
        targets: (...), distances in the unit of the bins, in [0, n). The caller clamps them; a
            value outside is an error of the indexing below.
        reduction: "none", "mean" (over all targets, 0 when there are none) or "sum".

    Returns:
        fp32 tensor of the shape of ``targets``, or a scalar.

    Raises:
        ValueError: shapes do not fit, or ``reduction`` is not one of the above.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits must have the shape of targets and a last axis of bins, got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f'reduction must be "none", "mean" or "sum", got {reduction!r}')
    with torch.autocast(logits.device.type, enabled=False):
        log_probabilities = F.log_softmax(logits.float(), dim=-1)
        targets = targets.detach().float()
        left = targets.floor()
        weight_right = targets - left
        bins = torch.stack((left, left + 1), dim=-1).long()
        log_left, log_right = log_probabilities.gather(-1, bins).unbind(dim=-1)
        loss = -((1 - weight_right) * log_left + weight_right * log_right)
        if reduction == "mean":
            return loss.sum() / max(loss.numel(), 1)
        return loss.sum() if reduction == "sum" else loss
