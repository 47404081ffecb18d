"""Distances between predictions of one batch, one value per position, from the shared losses."""

from typing import Callable, Dict

import torch

from kd_d2.losses.box import giou_loss, iou_log_loss
from kd_d2.losses.quality_focal import quality_focal_loss, quality_focal_loss_per_row
from kd_d2.losses.soft_targets import kl_divergence, soft_binary_cross_entropy

__all__ = ["CLS_LOSSES", "REG_LOSSES", "centerness_loss"]


def _qfl(logits, target_logits, gamma, detach):
    if detach:
        return quality_focal_loss_per_row(logits, target_logits, gamma)
    targets = target_logits.float().sigmoid()
    return quality_focal_loss(logits, targets, gamma, detach_targets=False).sum(dim=-1)


def _bce(logits, target_logits, gamma, detach):
    return soft_binary_cross_entropy(logits, target_logits, detach_targets=detach).sum(dim=-1)


# (logits, target logits: both (N, R, K), gamma, detach targets) -> (N, R), summed over classes
CLS_LOSSES: Dict[str, Callable[..., torch.Tensor]] = {"qfl": _qfl, "bce": _bce}


def _kl(pred, target, anchors, codec, tau, detach):
    """Mean over the four sides of the divergence of their distributions."""
    bins = codec.box_dim // 4
    sides = [x.reshape(*x.shape[:2], 4, bins) for x in (pred, target)]
    return kl_divergence(*sides, temperature=tau, detach_targets=detach).mean(dim=-1)


def _decoded(box_loss):
    def loss(pred, target, anchors, codec, tau, detach):
        priors = anchors.expand(len(pred), -1, -1).reshape(-1, 4)
        boxes = [codec.apply_deltas(x.float().flatten(0, 1), priors) for x in (pred, target)]
        return box_loss(*boxes, detach_targets=detach).view(pred.shape[:2])

    return loss


# (raw, target raw: both (N, R, D), anchors (R, 4), codec, temperature, detach targets) -> (N, R)
REG_LOSSES: Dict[str, Callable[..., torch.Tensor]] = {
    "kl": _kl,
    "giou": _decoded(giou_loss),
    "iou_log": _decoded(iou_log_loss),
}


def centerness_loss(logits, target_logits, detach) -> torch.Tensor:
    """BCE with the teacher's centerness (N, R, 1) as soft target; (N, R)."""
    return soft_binary_cross_entropy(logits, target_logits, detach_targets=detach).squeeze(-1)
