"""Non-maximum suppression over a batch, without a loop in what an exporter records.

Both functions do the same: within each of G groups of each of B sets of boxes, a candidate is
dropped if its IoU with a better one that was kept is above the threshold. The sets and groups never
touch one another, so that no offsets are added to the coordinates, which costs digits.
"""

from typing import Callable

import torch
import torchvision  # noqa: F401 - registers torch.ops.torchvision.nms
from torch import Tensor

__all__ = ["Suppress", "suppress", "suppress_onnx"]

Suppress = Callable[[Tensor, Tensor, Tensor, float, int], Tensor]
"""Signature of :func:`suppress`."""

# Score of what is no candidate, and a threshold between it and all others.
_NO_CANDIDATE = -1e30
_THRESHOLD = -1e29


@torch.jit.script
def suppress(
    boxes: Tensor, scores: Tensor, candidates: Tensor, iou_threshold: float, limit: int
) -> Tensor:
    """Which candidates non-maximum suppression keeps.

    A script, because the number of sets may differ from that of the traced example.

    Args:
        boxes: (B, R, 4), XYXY.
        scores: (B, G, R).
        candidates: bool (B, G, R); what is none suppresses nothing and is not kept.
        iou_threshold: IoU above which the weaker of two is dropped.
        limit: best ones kept of a group.

    Returns:
        bool (B, G, R).
    """
    keep = torch.zeros_like(candidates)
    for b in range(scores.shape[0]):
        for g in range(scores.shape[1]):
            index = candidates[b, g].nonzero().flatten()
            if index.numel() > 0:
                kept = torch.ops.torchvision.nms(
                    boxes[b][index], scores[b, g][index], iou_threshold
                )
                keep[b, g, index[kept[:limit]]] = True
    return keep


class _NonMaxSuppression(torch.autograd.Function):
    """The ONNX operator: (B, R, 4), (B, G, R) -> (S, 3), set, group and row of the kept ones."""

    @staticmethod
    def forward(ctx, boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
        return suppress(boxes, scores, scores > _THRESHOLD, iou_threshold, limit).nonzero()

    @staticmethod
    def symbolic(g, boxes, scores, iou_threshold: float, limit: int):
        constants = [
            g.op("Constant", value_t=torch.tensor([value], dtype=dtype))
            for value, dtype in (
                (limit, torch.int64),
                (iou_threshold, torch.float32),
                (_THRESHOLD, torch.float32),
            )
        ]
        return g.op("NonMaxSuppression", boxes, scores, *constants)


def suppress_onnx(
    boxes: Tensor, scores: Tensor, candidates: Tensor, iou_threshold: float, limit: int
) -> Tensor:
    """:func:`suppress` as one operator of ONNX when it is exported."""
    scores = torch.where(candidates, scores, torch.full_like(scores, _NO_CANDIDATE))
    sets, groups, rows = _NonMaxSuppression.apply(boxes, scores, iou_threshold, limit).unbind(dim=1)
    position = (sets * scores.shape[1] + groups) * scores.shape[2] + rows
    keep = torch.zeros_like(scores).flatten().scatter(0, position, torch.ones_like(position) * 1.0)
    return keep.view_as(scores) > 0
