"""The box coder of GFL: each side is a distribution over distances."""

from typing import Optional

import torch
from torch import Tensor

from kd_d2.losses.distribution import distribution_focal_loss

__all__ = ["DistributionBox2BoxTransform"]


class DistributionBox2BoxTransform:
    """Boxes as distances from an anchor's centre to the four sides, in strides.

    Predicted are, per side, logits of n + 1 bins for the distances 0, 1, ..., n; the distance is
    the expectation of their softmax (Generalized Focal Loss, Li et al., NeurIPS 2020, eq. 5).
    The stride is read off the anchor, whose width is ``anchor_scale`` strides.

    Same two methods as Detectron2's box-to-box transforms, so that everything which decodes
    predictions of a dense detector takes this one as well.
    """

    def __init__(self, reg_max: int = 16, anchor_scale: float = 8.0):
        """
        Args:
            reg_max: n, the largest distance in strides.
            anchor_scale: width of the anchors in strides.

        Raises:
            ValueError: one of them is not positive.
        """
        if reg_max < 1 or anchor_scale <= 0:
            raise ValueError(
                f"REG_MAX must be at least 1 and ANCHOR_SCALE positive, got {reg_max} and "
                f"{anchor_scale}"
            )
        self.reg_max = int(reg_max)
        self.anchor_scale = float(anchor_scale)
        # Numbers predicted per box, the last axis of what apply_deltas takes.
        self.box_dim = 4 * (self.reg_max + 1)

    def distances(self, deltas: Tensor) -> Tensor:
        """Expected distances of the four sides.

        Args:
            deltas: (R, 4 * (n + 1)) logits: all bins of the left side, then top, right, bottom.

        Returns:
            (R, 4) fp32, in strides, between 0 and n.
        """
        probabilities = self.side_logits(deltas).float().softmax(dim=-1)
        bins = torch.arange(
            self.reg_max + 1, dtype=probabilities.dtype, device=probabilities.device
        )
        # Not a matrix product: autocast would run one in half precision.
        return (probabilities * bins).sum(dim=-1)

    def side_logits(self, deltas: Tensor) -> Tensor:
        """Returns the logits (R, 4 * (n + 1)) as (R, 4, n + 1), one row per side."""
        return deltas.reshape(-1, 4, self.reg_max + 1)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Decoded boxes.

        Args:
            deltas: (R, 4 * (n + 1)) logits as in :meth:`distances`.
            boxes: (R, 4) square anchors, XYXY in absolute pixels of the padded image.

        Returns:
            (R, 4) fp32 XYXY in absolute pixels, not clipped to the image; x2 >= x1, y2 >= y1.
        """
        centers, strides = self._centers_and_strides(boxes.float())
        left_top, right_bottom = (self.distances(deltas) * strides).split(2, dim=1)
        return torch.cat((centers - left_top, centers + right_bottom), dim=1)

    def get_deltas(
        self, src_boxes: Tensor, target_boxes: Tensor, max_distance: Optional[float] = None
    ) -> Tensor:
        """Distances that describe ``target_boxes``, i.e. what :meth:`distances` should return.

        Args:
            src_boxes: (R, 4) square anchors, XYXY in absolute pixels.
            target_boxes: (R, 4) XYXY in absolute pixels.
            max_distance: clamp to [0, max_distance]; None: no clamping, distances are negative
                where the anchor's centre is outside of the target.

        Returns:
            (R, 4) distances left, top, right, bottom in strides.
        """
        centers, strides = self._centers_and_strides(src_boxes)
        left_top = centers - target_boxes[:, :2]
        right_bottom = target_boxes[:, 2:] - centers
        distances = torch.cat((left_top, right_bottom), dim=1) / strides
        return distances if max_distance is None else distances.clamp(0, max_distance)

    def focal_loss(self, deltas: Tensor, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Distribution focal loss, mean over the four sides.

        Args:
            deltas: (R, 4 * (n + 1)) logits.
            src_boxes, target_boxes: (R, 4).

        Returns:
            (R,) fp32.
        """
        # A target on the last bin would have no right neighbour.
        targets = self.get_deltas(src_boxes, target_boxes, max_distance=self.reg_max - 0.1)
        return distribution_focal_loss(self.side_logits(deltas), targets).mean(dim=1)

    def _centers_and_strides(self, boxes: Tensor):
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        strides = (boxes[:, 2:3] - boxes[:, :1]) / self.anchor_scale
        return centers, strides
