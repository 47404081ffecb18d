"""The refinement module: adjusts one anchor per cell and rates it (Sec. 3.2)."""

import math
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from kd_d2.losses.precision import full_precision
from kd_d2.modeling.layers import reduce_mean

from .anchors import anchor_sides, check_levels_and_centres
from .assignment import CenterAssigner
from .normalisers import CLS_NORMS, REG_NORMS, Counts
from .options import choice
from .selection import NMS_SCOPES, select_boxes

__all__ = ["RefinementModule", "RefinementOutput"]


class RefinementOutput(NamedTuple):
    """What the other parts of the detector need."""

    proposals: List[Instances]
    """Adjusted boxes of each image, best first, without graph: ``proposal_boxes`` (clipped),
    ``objectness_logits``, ``anchor_index`` (flat number of the cell, int64) and ``level``
    (0 is the finest, int64)."""
    losses: Dict[str, Tensor]
    """``loss_refine_cls`` and ``loss_refine_reg``; none in evaluation mode."""
    deltas: List[Tensor]
    """(dx, dy, dw, dh) of all anchors, (N, 4, H, W) per level, with graph."""
    anchors: List[Boxes]
    """H * W anchors per level."""


@PROPOSAL_GENERATOR_REGISTRY.register()
class RefinementModule(RPN):
    """Detectron2's RPN with other labels, normalisers and choice of boxes.

    The head (3x3 convolution with ReLU, two 1x1 layers, weights N(0, 0.01)) is shared by the
    levels. All anchors enter the classification loss, only positives the regression. In training
    the best boxes after NMS are returned, in evaluation the best ones without NMS. Boxes carry
    no graph, so that only the two losses here reach the head.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        head: nn.Module,
        anchor_generator: nn.Module,
        assigner: CenterAssigner,
        box2box_transform: Box2BoxTransform,
        batch_size_per_image: int = 256,
        pre_nms_topk: Tuple[int, int] = (0, 0),
        post_nms_topk: Tuple[int, int] = (2000, 1000),
        nms_thresh: float = 0.8,
        nms_scope: str = "joint",
        min_box_size: float = 0.0,
        prior_prob: float = 0.01,
        cls_norm: str = "fixed",
        reg_norm: str = "num_pos",
        loss_weight: Optional[Mapping[str, float]] = None,
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
    ):
        """
        Args:
            in_features: names of the levels, finest first.
            head: as Detectron2's ``StandardRPNHead``, for one anchor per cell.
            anchor_generator: one anchor per cell.
            assigner: see :class:`CenterAssigner`.
            box2box_transform: coding of the adjustment.
            batch_size_per_image: constant of the normaliser "fixed"; nothing is sampled.
            pre_nms_topk: (training, evaluation), best anchors of all levels together that are
                looked at, 0 for all.
            post_nms_topk: (training, evaluation), most boxes of an image.
            nms_thresh: IoU above which a box suppresses a worse one; training only.
            nms_scope: "joint" (all levels together) or "per_level".
            min_box_size: smallest side of a clipped box in pixels, exclusive.
            prior_prob: initial probability of an object.
            cls_norm: "fixed" (per image), "num_pos" or "mean" (all anchors).
            reg_norm: "num_pos" (mean over processes, at least 1) or "fixed".
            loss_weight: factors by name of loss, 1 if missing.
            box_reg_loss_type, smooth_l1_beta: as of ``RPN``; L1 by default.

        Raises:
            ValueError: unknown name, probability outside (0, 1).
        """
        if not 0 < prior_prob < 1:
            raise ValueError(
                f"MODEL.MIMICDET.REFINE.PRIOR_PROB must lie between 0 and 1, got {prior_prob}"
            )
        super().__init__(
            in_features=list(in_features),
            head=head,
            anchor_generator=anchor_generator,
            anchor_matcher=None,
            box2box_transform=box2box_transform,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=1.0,
            pre_nms_topk=pre_nms_topk,
            post_nms_topk=post_nms_topk,
            nms_thresh=nms_thresh,
            min_box_size=min_box_size,
            loss_weight=dict(loss_weight or {}),
            box_reg_loss_type=box_reg_loss_type,
            smooth_l1_beta=smooth_l1_beta,
        )
        self.assigner = assigner
        self._cls_norm = choice("REFINE.CLS_NORM", cls_norm, CLS_NORMS)
        self._reg_norm = choice("REFINE.REG_NORM", reg_norm, REG_NORMS)
        self._nms_scope = choice("PROPOSAL.NMS_SCOPE", nms_scope, NMS_SCOPES)
        nn.init.constant_(head.objectness_logits.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        """
        Args:
            input_shape: of all levels of the pyramid.

        Raises:
            ValueError: levels that the pyramid lacks, or anchors that are not one square of
                ``BASE_SCALE`` cells in the centre of each cell.
        """
        check_levels_and_centres(cfg, input_shape)
        node = cfg.MODEL.MIMICDET
        # unused ones of RPN are left out
        arguments = super().from_config(cfg, input_shape)
        for name in ("anchor_matcher", "positive_fraction", "anchor_boundary_thresh"):
            del arguments[name]
        sides = anchor_sides(cfg, input_shape, arguments["anchor_generator"])
        weights = arguments.pop("loss_weight")
        return {
            **arguments,
            "assigner": CenterAssigner(
                anchor_sides=sides,
                eta=node.REFINE.ETA,
                center_ratio=node.REFINE.CENTER_RATIO,
                fallback_nearest=node.REFINE.FALLBACK_NEAREST,
            ),
            "nms_scope": node.PROPOSAL.NMS_SCOPE,
            "prior_prob": node.REFINE.PRIOR_PROB,
            "cls_norm": node.REFINE.CLS_NORM,
            "reg_norm": node.REFINE.REG_NORM,
            "loss_weight": {
                "loss_refine_cls": weights["loss_rpn_cls"],
                "loss_refine_reg": weights["loss_rpn_loc"],
            },
        }

    def forward(
        self,
        images: ImageList,
        features: Dict[str, Tensor],
        gt_instances: Optional[List[Instances]] = None,
    ) -> RefinementOutput:
        """Return adjusted boxes, losses, raw deltas and anchors.

        Args:
            images: N images; only their sizes without padding are read.
            features: (N, C, H, W) maps by name.
            gt_instances: with ``gt_boxes``; needed in training only.

        Raises:
            ValueError: no ``gt_instances`` in training.
            FloatingPointError: infinite or NaN boxes or scores in training.
        """
        if self.training and gt_instances is None:
            raise ValueError("the refinement module needs gt_instances in training")
        anchors, deltas, flat_logits, flat_deltas = self.predict(features)
        losses = {}
        if self.training:
            labels, gt_boxes = self.label_and_sample_anchors(anchors, gt_instances)
            losses = self.losses(anchors, flat_logits, labels, flat_deltas, gt_boxes)
        proposals = self.predict_proposals(anchors, flat_logits, flat_deltas, images.image_sizes)
        return RefinementOutput(proposals, losses, deltas, anchors)

    def predict(
        self, features: Dict[str, Tensor]
    ) -> Tuple[List[Boxes], List[Tensor], List[Tensor], List[Tensor]]:
        """Return anchors and predictions of each level, before any box is chosen.

        Args:
            features: (N, C, H, W) maps by name.

        Returns:
            anchors, H * W of them; raw deltas, (N, 4, H, W); and in fp32 logits, (N, HW), and the
            same deltas, (N, HW, 4).
        """
        levels = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(levels)
        logits, deltas = self.rpn_head(levels)
        # one anchor per cell: (N, 1, H, W) -> (N, HW), (N, 4, H, W) -> (N, HW, 4)
        flat_logits = [full_precision(x).flatten(1) for x in logits]
        flat_deltas = [full_precision(x).flatten(2).transpose(1, 2) for x in deltas]
        return anchors, deltas, flat_logits, flat_deltas

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: List[Boxes], gt_instances: List[Instances]
    ) -> Tuple[List[Tensor], List[Tensor]]:
        """Return labels, 1 or 0, and boxes of all anchors, (A,) and (A, 4) per image.

        Nothing is sampled or ignored. The box of a negative means nothing.

        Args:
            anchors: per level.
            gt_instances: with ``gt_boxes``.
        """
        labels, boxes = [], []
        for truth in gt_instances:
            index = self.assigner(anchors, truth.gt_boxes)
            labels.append((index >= 0).to(torch.int8))
            # row -1 is the last one; without ground truth that is the row appended here
            table = cat((truth.gt_boxes.tensor, truth.gt_boxes.tensor.new_zeros(1, 4)))
            boxes.append(table[index])
        return labels, boxes

    def losses(
        self,
        anchors: List[Boxes],
        pred_objectness_logits: List[Tensor],
        gt_labels: List[Tensor],
        pred_anchor_deltas: List[Tensor],
        gt_boxes: List[Tensor],
    ) -> Dict[str, Tensor]:
        """Return ``loss_refine_cls`` and ``loss_refine_reg``.

        The former is the binary cross-entropy of all anchors, the latter the L1 distance (sum over
        4 coordinates) of the positives, each divided by its normaliser. Logs the positives per
        image, ``mimicdet/num_refine_positives``.

        Args:
            anchors: per level.
            pred_objectness_logits: (N, HW) per level.
            gt_labels: (A,) per image.
            pred_anchor_deltas: (N, HW, 4) per level.
            gt_boxes: (A, 4) per image.
        """
        labels = torch.stack(gt_labels)
        positive = labels == 1
        num_positive = positive.sum()
        counts = Counts(
            fixed=self.batch_size_per_image * len(labels),
            anchors=labels.numel(),
            # collective, hence also where it is not used
            positives=reduce_mean(num_positive.float()).clamp(min=1),
        )
        get_event_storage().put_scalar(
            "mimicdet/num_refine_positives", num_positive.item() / len(labels)
        )
        with torch.autocast(labels.device.type, enabled=False):
            logits = full_precision(cat(pred_objectness_logits, dim=1))
            cls_loss = F.binary_cross_entropy_with_logits(
                logits, labels.to(logits.dtype), reduction="sum"
            )
            _, cell = positive.nonzero(as_tuple=True)
            reg_loss = _dense_box_regression_loss(
                [Boxes.cat(anchors)[cell]],
                self.box2box_transform,
                [full_precision(cat(pred_anchor_deltas, dim=1))[positive][None]],
                [torch.stack(gt_boxes)[positive]],
                ...,
                box_reg_loss_type=self.box_reg_loss_type,
                smooth_l1_beta=self.smooth_l1_beta,
            )
        losses = {
            "loss_refine_cls": cls_loss / self._cls_norm(counts),
            "loss_refine_reg": reg_loss / self._reg_norm(counts),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @property
    def num_proposals(self) -> int:
        """Most boxes of an image in evaluation mode, where there is no NMS."""
        # the smaller of both limits; 0 is none
        return min(self.post_nms_topk[False], self.pre_nms_topk[False] or math.inf)

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: List[Boxes],
        pred_objectness_logits: List[Tensor],
        pred_anchor_deltas: List[Tensor],
        image_sizes: List[Tuple[int, int]],
    ) -> List[Instances]:
        """Return the best adjusted boxes of each image, see :class:`RefinementOutput`.

        Args:
            anchors: per level.
            pred_objectness_logits: (N, HW) per level.
            pred_anchor_deltas: (N, HW, 4) per level.
            image_sizes: (height, width) without padding.

        Raises:
            FloatingPointError: infinite or NaN boxes or scores in training.
        """
        boxes = cat(self._decode_proposals(anchors, pred_anchor_deltas), dim=1)
        logits = cat(pred_objectness_logits, dim=1)
        if self.training and not (boxes.isfinite().all() and logits.isfinite().all()):
            raise FloatingPointError(
                "Adjusted boxes or their scores contain Inf/NaN. Training has diverged."
            )
        counts = torch.as_tensor([len(x) for x in anchors], device=logits.device)
        level = torch.arange(len(counts), device=logits.device).repeat_interleave(counts)
        options = {
            "limit": self.post_nms_topk[self.training],
            "limit_before": self.pre_nms_topk[self.training],
            "min_size": self.min_box_size,
        }
        if self.training:
            options.update(nms_thresh=self.nms_thresh, nms_scope=self._nms_scope)
        else:
            options["limit_before"] = self.num_proposals
        return [
            select_boxes(boxes[i], logits[i], level, size, **options)
            for i, size in enumerate(image_sizes)
        ]
