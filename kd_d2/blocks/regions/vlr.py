"""The valuable localisation region of LD."""

from typing import List

import torch
from detectron2.structures import Boxes, pairwise_iou
from torchvision.ops import distance_box_iou

from kd_d2.modeling.layers import atss_candidates, atss_threshold, paired_iou, valid_anchor_mask

from ..registry import KD_REGIONS
from .base import AnchorRegion

__all__ = ["VLR"]


@KD_REGIONS.register()
class VLR(AnchorRegion):
    """Valuable localisation region: anchors that are near an object but not near enough for ATSS.

    On where gamma theta_g <= DIoU(anchor, g) < theta_g for an object g, theta_g being the threshold
    of ATSS (mean plus deviation of the IoUs of the nearest anchors of every level). The weight is
    the largest IoU with those g. Positives of one object may lie in the region of another.
    Official code of LD (Zheng et al., Localization Distillation, CVPR 2022).
    """

    def __init__(
        self, gamma: float = 0.25, topk: int = 9, weight: str = "iou", anchor_scale: float = 0.0
    ):
        """
        Args:
            gamma: in [0, 1).
            topk: candidates per object and level, of ATSS.
            weight: "iou", or "one" for a mask.
            anchor_scale: compare squares of this many strides around the centres instead of the
                anchors, for FCOS, whose points have no size; 0: the anchors.

        Raises:
            ValueError: one of them is not as above.
        """
        if not 0 <= gamma < 1 or topk < 1 or weight not in ("iou", "one") or anchor_scale < 0:
            raise ValueError(
                'VLR: gamma in [0, 1), topk >= 1, weight "iou" or "one" and anchor_scale >= 0, got '
                f"{gamma}, {topk}, {weight!r} and {anchor_scale}"
            )
        self._gamma, self._topk, self._scale = gamma, topk, anchor_scale
        self._as_mask = weight == "one"
        self._offset = 0.0

    def bind(self, student_keys, teacher_keys):
        super().bind(student_keys, teacher_keys)
        self._offset = dict(student_keys["anchors"].signature[:1]).get("offset", 0.0)

    def anchors(self, ctx):
        model = ctx.student.model
        strides = ctx.student.tap.anchor_strides(model)
        own = ctx.student["anchors"]
        levels = (
            [_squares(x, self._scale * s) for x, s in zip(own, strides)] if self._scale else own
        )
        divisibility = model.backbone.size_divisibility
        rows = []
        for targets, size in zip(ctx.gt_instances, ctx.image_sizes):
            valid = valid_anchor_mask(own, strides, size, divisibility, self._offset)
            rows.append(self._one_image(levels, targets.gt_boxes, valid))
        return torch.stack(rows)

    def _one_image(self, levels: List[Boxes], gt_boxes: Boxes, valid) -> torch.Tensor:
        anchors = Boxes.cat(levels).tensor
        if not len(gt_boxes):
            return anchors.new_zeros(len(anchors))
        candidates = atss_candidates(levels, gt_boxes, valid, self._topk)
        ious = paired_iou(anchors[candidates], gt_boxes.tensor[:, None])
        threshold = atss_threshold(ious, valid[candidates])[:, None]
        diou = distance_box_iou(gt_boxes.tensor, anchors)
        inside = (diou >= self._gamma * threshold) & (diou < threshold) & valid
        if self._as_mask:
            return inside.any(dim=0).to(anchors.dtype)
        return (pairwise_iou(gt_boxes, Boxes(anchors)) * inside).amax(dim=0)


def _squares(boxes: Boxes, side: float) -> Boxes:
    centers = boxes.get_centers()
    return Boxes(torch.cat((centers - side / 2, centers + side / 2), dim=1))
