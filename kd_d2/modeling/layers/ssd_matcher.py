"""Assignment of ground-truth boxes to SSD's default boxes."""

import torch
from torch import Tensor

__all__ = ["SSDMatcher"]


class SSDMatcher:
    """Matches by IoU; then every ground-truth box claims its best default box.

    SSD (Liu et al., ECCV 2016), section 2.2, in the order of mmdetection's assigner: a default
    box whose largest IoU reaches the threshold gets the ground-truth box it is largest with; then
    the ground-truth boxes, one after the other, take their best default box, whatever the IoU and
    whoever had it. There is no band of ignored boxes. Of equal IoUs the first counts, on every
    device. ``detectron2.modeling.Matcher`` differs: all ties become positive, nothing is taken
    over.
    """

    def __init__(self, iou_threshold: float = 0.5):
        """
        Args:
            iou_threshold: in (0, 1].

        Raises:
            ValueError: it is not.
        """
        if not 0 < iou_threshold <= 1:
            raise ValueError(f"MODEL.SSD.IOU_THRESH must be in (0, 1], got {iou_threshold}")
        self.iou_threshold = iou_threshold

    @torch.no_grad()
    def __call__(self, ious: Tensor) -> Tensor:
        """The ground-truth box of each default box.

        Args:
            ious: (M, R), M ground-truth boxes, R default boxes.

        Returns:
            int64 (R,), index in 0..M-1, or -1 for background.
        """
        num_gt, num_boxes = ious.shape
        if num_gt == 0:
            return torch.full((num_boxes,), -1, dtype=torch.long, device=ious.device)
        best_gt = _first_argmax(ious, dim=0)
        positive = ious.amax(dim=0) >= self.iou_threshold
        matched = torch.where(positive, best_gt, -1)
        # The last of several claims on one box stands, and that is the largest index.
        rows = torch.arange(num_gt, device=ious.device)
        claims = torch.full_like(matched, -1)
        claims.scatter_reduce_(0, _first_argmax(ious, dim=1), rows, "amax")
        return torch.where(claims >= 0, claims, matched)


def _first_argmax(values: Tensor, dim: int) -> Tensor:
    """Index of the largest value; of equal ones the first, which ``argmax`` does not promise."""
    indices = torch.arange(values.shape[dim], device=values.device)
    indices = indices[:, None] if dim == 0 else indices
    largest = values == values.amax(dim=dim, keepdim=True)
    return torch.where(largest, indices, values.shape[dim] - 1).amin(dim=dim)
