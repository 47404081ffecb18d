"""Generalized Focal Loss detector."""

from typing import Dict, List

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from fvcore.nn import giou_loss
from torch import Tensor

from kd_d2.losses.quality_focal import quality_focal_loss

from ..layers import DistributionBox2BoxTransform, paired_iou, reduce_mean
from .atss_detector import ATSSAssignedDetector
from .dense_head import DenseHead

__all__ = ["GFL"]


@META_ARCH_REGISTRY.register()
class GFL(ATSSAssignedDetector):
    """Generalized Focal Loss (Li et al., NeurIPS 2020), with the official training recipe.

    The class score of a positive anchor is trained towards the IoU of its own decoded box (quality
    focal loss), so it needs no centerness; each box side is a distribution over distances.
    """

    @configurable
    def __init__(
        self,
        *,
        qfl_beta: float = 2.0,
        cls_loss_weight: float = 1.0,
        giou_loss_weight: float = 2.0,
        dfl_loss_weight: float = 0.25,
        **kwargs,
    ):
        """
        Args:
            qfl_beta: exponent of the quality focal loss, 0 or at least 1.
            cls_loss_weight: of the quality focal loss.
            giou_loss_weight: of the GIoU loss.
            dfl_loss_weight: of the distribution focal loss.
            kwargs: see :class:`ATSSAssignedDetector`; ``box2box_transform`` is a
                :class:`DistributionBox2BoxTransform`.
        """
        super().__init__(**kwargs)
        self.qfl_beta = qfl_beta
        self.cls_loss_weight = cls_loss_weight
        self.giou_loss_weight = giou_loss_weight
        self.dfl_loss_weight = dfl_loss_weight

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.GFL
        if node.QFL_BETA < 0 or 0 < node.QFL_BETA < 1:
            raise ValueError(f"MODEL.GFL.QFL_BETA must be 0 or at least 1, got {node.QFL_BETA}")
        args = cls.common_arguments(cfg, node)
        shapes = args["backbone"].output_shape()
        coder = DistributionBox2BoxTransform(node.REG_MAX, node.ANCHOR_SCALE)
        args.update(
            head=DenseHead(
                node,
                input_shape=[shapes[name] for name in node.IN_FEATURES],
                box_dim=coder.box_dim,
            ),
            box2box_transform=coder,
            qfl_beta=node.QFL_BETA,
            cls_loss_weight=node.CLS_LOSS_WEIGHT,
            giou_loss_weight=node.GIOU_LOSS_WEIGHT,
            dfl_loss_weight=node.DFL_LOSS_WEIGHT,
        )
        return args

    def losses(
        self,
        anchors: List[Boxes],
        pred_logits: List[Tensor],
        pred_deltas: List[Tensor],
        gt_labels: List[Tensor],
        gt_boxes: List[Tensor],
    ) -> Dict[str, Tensor]:
        """Weighted losses, in fp32.

        With P the number of positives (at least 1 per image) and S the sum over the positives of
        w = max_c sigma(logit_c), both averaged over processes, S at least 1:
        classification is the sum of the QFL over valid anchors and classes / P; GIoU and DFL are
        sums over positives, weighted by w (constant), / S, the DFL averaged over the four sides.

        Args:
            anchors: per level (Ri, 4).
            pred_logits: per level (N, Ri, K).
            pred_deltas: per level (N, Ri, 4 * (n + 1)).
            gt_labels, gt_boxes: per image (R,) and (R, 4), see :meth:`label_anchors`.

        Returns:
            Scalars "loss_gfl_cls", "loss_gfl_box" and "loss_gfl_dfl".
        """
        labels, boxes = torch.stack(gt_labels), torch.stack(gt_boxes)
        valid = labels >= 0
        is_positive = valid & (labels != self.num_classes)
        positive = is_positive.nonzero(as_tuple=True)  # image and anchor index, each (P,)
        coder = self.box2box_transform

        with torch.autocast(labels.device.type, enabled=False):
            logits = torch.cat(pred_logits, dim=1).float()
            deltas = torch.cat(pred_deltas, dim=1)[positive].float()
            priors = Boxes.cat(anchors).tensor[positive[1]]
            targets = boxes[positive]
            decoded = coder.apply_deltas(deltas, priors)

            # The quality is the IoU of the box as it is now; no gradient through it.
            iou = paired_iou(decoded.detach(), targets)
            quality = torch.zeros_like(logits)
            quality[positive + (labels[positive],)] = iou
            weights = logits.detach()[positive].sigmoid().amax(dim=1)

            counts = is_positive.sum(dim=1).clamp(min=1).sum()
            num_positive, weight_sum = reduce_mean(
                torch.stack((counts.float(), weights.sum()))
            ).unbind()
            weight_sum = weight_sum.clamp(min=1)

            loss_cls = quality_focal_loss(logits, quality, self.qfl_beta).sum(dim=2)
            loss_box = giou_loss(decoded, targets)
            loss_dfl = coder.focal_loss(deltas, priors, targets)
            losses = {
                "loss_gfl_cls": self.cls_loss_weight * (loss_cls * valid).sum() / num_positive,
                "loss_gfl_box": self.giou_loss_weight * (loss_box * weights).sum() / weight_sum,
                "loss_gfl_dfl": self.dfl_loss_weight * (loss_dfl * weights).sum() / weight_sum,
            }

        storage = get_event_storage()
        storage.put_scalar("num_pos_anchors", len(iou) / len(gt_labels))
        storage.put_scalar("gfl/mean_iou", iou.sum().item() / max(len(iou), 1))
        return losses

    def scores(self, predictions: List[List[Tensor]]) -> List[List[Tensor]]:
        scores = [logits.float().sigmoid() for logits in predictions[0]]
        return [x * (x > self.test_score_thresh) for x in scores]
