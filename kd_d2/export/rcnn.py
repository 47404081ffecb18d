"""Graphs of Detectron2's R-CNN family: boxes of Faster R-CNN, C4 and Cascade R-CNN."""

from typing import Callable, Dict, List, Tuple

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    StandardROIHeads,
)
from torch import Tensor, nn

from kd_d2.modeling.layers import bounded_topk
from kd_d2.modeling.roi_heads import KDRes5ROIHeads

from .graph import DetectionGraph, clip, gather_rows, is_nonempty, register_graph
from .second_stage import detections_of_classes, pool

__all__ = ["BOX_STAGES", "RCNNGraph"]

# Objectness logits of what is no proposal.
_NO_PROPOSAL = -1e30

# (N, P, G, 4) boxes, and (N, P, K) probabilities
_Outputs = Tuple[Tensor, Tensor]


def _decode(
    predictor: FastRCNNOutputLayers, features: Tensor, boxes: Tensor
) -> Tuple[Tensor, Tensor]:
    """Boxes (N, P, G, 4) and probabilities (N, P, K) from pooled features (N * P, ...)."""
    logits, deltas = predictor(features)
    decoded = predictor.box2box_transform.apply_deltas(deltas, boxes.flatten(0, 1))
    probabilities = logits.sigmoid() if predictor.use_sigmoid_ce else logits.softmax(dim=-1)
    num_images, num_classes = boxes.shape[0], predictor.num_classes
    return (
        decoded.view(num_images, -1, predictor.bbox_pred.out_features // 4, 4),
        probabilities[:, :num_classes].reshape(num_images, -1, num_classes),
    )


def _standard(heads: nn.Module, features: List[Tensor], boxes: Tensor, size) -> _Outputs:
    pooled = pool(heads.box_pooler, features, boxes)
    return _decode(heads.box_predictor, heads.box_head(pooled), boxes)


def _res5(heads: nn.Module, features: List[Tensor], boxes: Tensor, size) -> _Outputs:
    pooled = heads.res5(pool(heads.pooler, features, boxes))
    return _decode(heads.box_predictor, pooled.mean(dim=[2, 3]), boxes)


def _cascade(heads: nn.Module, features: List[Tensor], boxes: Tensor, size) -> _Outputs:
    decoded, total = boxes[:, :, None], 0.0
    for head, predictor in zip(heads.box_head, heads.box_predictor):
        boxes = clip(decoded[:, :, 0], size)
        pooled = pool(heads.box_pooler, features, boxes)
        decoded, probabilities = _decode(predictor, head(pooled), boxes)
        total = total + probabilities
    return decoded, total * (1.0 / heads.num_cascade_stages)


BOX_STAGES: Dict[type, Callable[[nn.Module, List[Tensor], Tensor, Tuple], _Outputs]] = {
    StandardROIHeads: _standard,
    CascadeROIHeads: _cascade,
    Res5ROIHeads: _res5,
    KDRes5ROIHeads: _res5,
}
"""By the exact class of the RoI heads: from (heads, features, (N, P, 4) proposals, image size) to
boxes (N, P, 1 or K, 4) and probabilities (N, P, K), without the background."""


@register_graph("GeneralizedRCNN")
class RCNNGraph(DetectionGraph):
    """RPN and one of :data:`BOX_STAGES`."""

    def check(self, model):
        heads = model.roi_heads
        if type(model.proposal_generator) is not RPN:
            raise ValueError(
                "The proposal generator of an R-CNN graph must be Detectron2's RPN, got "
                f"{type(model.proposal_generator).__name__}."
            )
        if type(heads) not in BOX_STAGES:
            raise ValueError(
                f"MODEL.ROI_HEADS.NAME is {type(heads).__name__}; of these a graph can be made: "
                f"{', '.join(sorted(x.__name__ for x in BOX_STAGES))}."
            )
        for key, on in (("MASK_ON", "mask_on"), ("KEYPOINT_ON", "keypoint_on")):
            if getattr(heads, on, False):
                raise ValueError(
                    f"MODEL.{key} is True, but a graph has boxes only: set it to False."
                )

    @property
    def _predictor(self) -> nn.Module:
        """The predictor with the thresholds, the last one of a cascade."""
        predictor = self.model.roi_heads.box_predictor
        return predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor

    @property
    def settings(self):
        rpn, predictor = self.model.proposal_generator, self._predictor
        return {
            "score_threshold": predictor.test_score_thresh,
            "nms_threshold": predictor.test_nms_thresh,
            "max_detections": predictor.test_topk_per_image,
            "proposals": rpn.post_nms_topk[False],
            "proposals_per_level": rpn.pre_nms_topk[False],
            "proposals_nms_threshold": rpn.nms_thresh,
        }

    def detect(self, images, size):
        features = self.model.backbone(images)
        boxes, valid = self._proposals(features, size)
        heads = self.model.roi_heads
        names = getattr(heads, "box_in_features", heads.in_features)
        decoded, scores = BOX_STAGES[type(heads)](heads, [features[x] for x in names], boxes, size)
        return detections_of_classes(
            decoded,
            scores,
            valid,
            size,
            self.suppress,
            score_thresh=self._predictor.test_score_thresh,
            nms_thresh=self._predictor.test_nms_thresh,
            limit=self.max_detections,
        )

    def _proposals(self, features: Dict[str, Tensor], size) -> Tuple[Tensor, Tensor]:
        """The best boxes of the RPN, (N, P, 4), and which of them are not padding, (N, P)."""
        rpn = self.model.proposal_generator
        levels = [features[name] for name in rpn.in_features]
        anchors = rpn.anchor_generator(levels)
        logits, deltas = rpn.rpn_head(levels)
        # (N, A, H, W) -> (N, HWA), (N, A * 4, H, W) -> (N, HWA, 4)
        logits = [x.permute(0, 2, 3, 1).flatten(1) for x in logits]
        deltas = [
            x.view(x.shape[0], -1, 4, x.shape[-2], x.shape[-1]).permute(0, 3, 4, 1, 2).flatten(1, 3)
            for x in deltas
        ]
        boxes, scores = [], []
        for level in zip(rpn._decode_proposals(anchors, deltas), logits):
            best = self._proposals_of_level(*level, size)
            boxes.append(best[0])
            scores.append(best[1])
        scores, index = bounded_topk(torch.cat(scores, dim=1), rpn.post_nms_topk[False])
        return gather_rows(torch.cat(boxes, dim=1), index), scores > _NO_PROPOSAL / 2

    def _proposals_of_level(
        self, boxes: Tensor, logits: Tensor, size: Tuple[int, int]
    ) -> Tuple[Tensor, Tensor]:
        """The best boxes of a level, (N, k, 4), and their logits, (N, k), after suppression."""
        rpn = self.model.proposal_generator
        logits, index = bounded_topk(logits, rpn.pre_nms_topk[False])
        boxes = clip(gather_rows(boxes, index), size)
        keep = self.suppress(
            boxes,
            logits[:, None],
            is_nonempty(boxes, rpn.min_box_size)[:, None],
            rpn.nms_thresh,
            rpn.post_nms_topk[False],
        )[:, 0]
        return boxes, torch.where(keep, logits, torch.full_like(logits, _NO_PROPOSAL))
