"""ATSS detector: one anchor per cell, adaptive assignment, centerness."""

from typing import Dict, List

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from fvcore.nn import giou_loss, sigmoid_focal_loss
from torch import Tensor
from torch.nn import functional as F

from ..layers import DistributionBox2BoxTransform, apply_score_factor, centerness, reduce_mean
from .atss_detector import ATSSAssignedDetector
from .dense_head import DenseHead

__all__ = ["ATSS"]


class _DeltaTransform(Box2BoxTransform):
    """Detectron2's (dx, dy, dw, dh) coder; says how many numbers it takes per box."""

    box_dim = 4


@META_ARCH_REGISTRY.register()
class ATSS(ATSSAssignedDetector):
    """ATSS (Zhang et al., CVPR 2020), with the official training recipe.

    RetinaNet with one anchor per cell, assignment by statistics of the candidates' IoUs, GIoU
    loss weighted by the centerness, and a centerness predictor on the box tower.
    """

    @configurable
    def __init__(
        self,
        *,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        cls_loss_weight: float = 1.0,
        giou_loss_weight: float = 2.0,
        ctr_loss_weight: float = 1.0,
        dfl_loss_weight: float = 0.25,
        **kwargs,
    ):
        """
        Args:
            focal_loss_alpha: weight of positives, negatives have 1 - alpha; negative: neither.
            focal_loss_gamma: exponent of the modulating factor.
            cls_loss_weight: of the focal loss.
            giou_loss_weight: of the GIoU loss.
            ctr_loss_weight: of the cross-entropy of the centerness.
            dfl_loss_weight: of the distribution focal loss, if boxes are distributions.
            kwargs: see :class:`ATSSAssignedDetector`; ``box2box_transform`` takes four deltas, or
                is a :class:`DistributionBox2BoxTransform`.
        """
        super().__init__(**kwargs)
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.cls_loss_weight = cls_loss_weight
        self.giou_loss_weight = giou_loss_weight
        self.ctr_loss_weight = ctr_loss_weight
        self.dfl_loss_weight = dfl_loss_weight

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.ATSS
        if len(node.BBOX_REG_WEIGHTS) != 4 or min(node.BBOX_REG_WEIGHTS) <= 0:
            raise ValueError(
                "MODEL.ATSS.BBOX_REG_WEIGHTS must be four positive numbers, got "
                f"{node.BBOX_REG_WEIGHTS}"
            )
        args = cls.common_arguments(cfg, node)
        shapes = args["backbone"].output_shape()
        if node.REG_MAX:
            coder = DistributionBox2BoxTransform(node.REG_MAX, node.ANCHOR_SCALE)
        else:
            coder = _DeltaTransform(weights=tuple(node.BBOX_REG_WEIGHTS))
        args.update(
            head=DenseHead(
                node,
                input_shape=[shapes[name] for name in node.IN_FEATURES],
                box_dim=coder.box_dim,
                centerness_on="reg",
            ),
            box2box_transform=coder,
            focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
            focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
            cls_loss_weight=node.CLS_LOSS_WEIGHT,
            giou_loss_weight=node.GIOU_LOSS_WEIGHT,
            ctr_loss_weight=node.CTR_LOSS_WEIGHT,
            dfl_loss_weight=node.DFL_LOSS_WEIGHT,
        )
        return args

    def losses(
        self,
        anchors: List[Boxes],
        pred_logits: List[Tensor],
        pred_deltas: List[Tensor],
        pred_centerness: List[Tensor],
        gt_labels: List[Tensor],
        gt_boxes: List[Tensor],
    ) -> Dict[str, Tensor]:
        """Weighted losses, in fp32.

        With P the number of positives (at least 1 per image) and S the sum over the positives of
        the target centerness c, both averaged over processes, S at least 1: the focal loss is
        summed over valid anchors and classes / P, the GIoU loss over positives, weighted by c,
        / S, the cross-entropy of the centerness over positives / P.

        Args:
            anchors: per level (Ri, 4).
            pred_logits, pred_deltas, pred_centerness: per level (N, Ri, K), (N, Ri, box_dim) and
                (N, Ri, 1).
            gt_labels, gt_boxes: per image (R,) and (R, 4), see :meth:`label_anchors`.

        Returns:
            Scalars "loss_atss_cls", "loss_atss_box" and "loss_atss_ctr"; if boxes are
            distributions "loss_atss_dfl", averaged over the sides and weighted like the box loss.
        """
        labels, boxes = torch.stack(gt_labels), torch.stack(gt_boxes)
        valid = labels >= 0
        is_positive = valid & (labels != self.num_classes)
        positive = is_positive.nonzero(as_tuple=True)  # image and anchor index, each (P,)

        with torch.autocast(labels.device.type, enabled=False):
            logits = torch.cat(pred_logits, dim=1).float()
            deltas = torch.cat(pred_deltas, dim=1)[positive].float()
            ctrness = torch.cat(pred_centerness, dim=1)[positive].squeeze(dim=1).float()
            priors = Boxes.cat(anchors).tensor[positive[1]]
            targets = boxes[positive]
            decoded = self.box2box_transform.apply_deltas(deltas, priors)
            ctr_targets = self.centerness_targets(priors, targets)

            counts = is_positive.sum(dim=1).clamp(min=1).sum().float()
            num_positive, ctr_sum = reduce_mean(torch.stack((counts, ctr_targets.sum()))).unbind()
            ctr_sum = ctr_sum.clamp(min=1)

            one_hot = torch.zeros_like(logits)
            one_hot[positive + (labels[positive],)] = 1
            loss_cls = sigmoid_focal_loss(
                logits, one_hot, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
            ).sum(dim=2)
            loss_box = giou_loss(decoded, targets)
            loss_ctr = F.binary_cross_entropy_with_logits(ctrness, ctr_targets, reduction="sum")
            losses = {
                "loss_atss_cls": self.cls_loss_weight * (loss_cls * valid).sum() / num_positive,
                "loss_atss_box": self.giou_loss_weight * (loss_box * ctr_targets).sum() / ctr_sum,
                "loss_atss_ctr": self.ctr_loss_weight * loss_ctr / num_positive,
            }
            if self.box2box_transform.box_dim > 4:
                loss_dfl = self.box2box_transform.focal_loss(deltas, priors, targets)
                losses["loss_atss_dfl"] = (
                    self.dfl_loss_weight * (loss_dfl * ctr_targets).sum() / ctr_sum
                )

        storage = get_event_storage()
        num_local = len(ctr_targets)
        storage.put_scalar("num_pos_anchors", num_local / len(gt_labels))
        storage.put_scalar("atss/mean_centerness", ctr_targets.sum().item() / max(num_local, 1))
        return losses

    @staticmethod
    def centerness_targets(anchors: Tensor, gt_boxes: Tensor) -> Tensor:
        """Centerness of the anchors' centres in their boxes.

        Args:
            anchors: (R, 4) XYXY in absolute pixels, their centres inside of ``gt_boxes``.
            gt_boxes: (R, 4), same coordinates.

        Returns:
            (R,) in [0, 1].
        """
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        return centerness(torch.cat((centers - gt_boxes[:, :2], gt_boxes[:, 2:] - centers), dim=1))

    def scores(self, predictions: List[List[Tensor]]) -> List[List[Tensor]]:
        return [
            apply_score_factor(
                logits.float().sigmoid(),
                ctrness.float().sigmoid(),
                self.test_score_thresh,
                self.test_topk_candidates,
            )
            for logits, ctrness in zip(*predictions)
        ]
