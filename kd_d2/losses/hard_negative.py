"""Cross-entropy with hard-negative mining."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import full_precision

__all__ = ["hard_negative_cross_entropy"]


def hard_negative_cross_entropy(logits: Tensor, labels: Tensor, ratio: float = 3.0) -> Tensor:
    """Sum of the softmax cross-entropies of the positives and of the hardest negatives.

    Of an image with n positives the int(ratio * n) negatives with the largest loss count, all if
    there are fewer, none if n = 0 (SSD, section 2.2). With logits of 0 and K = 80 the sum is
    4 n ln 81.

    Args:
        logits: (N, R, K + 1), the background last.
        labels: int64 (N, R) in 0..K, K the background.
        ratio: negatives per positive, at least 0.

    Returns:
        fp32 scalar, connected to ``logits`` also without positives. Not normalised.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = full_precision(logits)
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        positive = labels != logits.shape[2] - 1
        with torch.no_grad():
            order = losses.masked_fill(positive, -1.0).argsort(dim=1, descending=True, stable=True)
            count = (positive.sum(dim=1, keepdim=True) * ratio).long()
            rank = torch.arange(labels.shape[1], device=labels.device)
            hardest = torch.zeros_like(positive).scatter(1, order, rank < count)
        return torch.where(positive | hardest, losses, 0.0).sum()
