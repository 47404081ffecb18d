"""The S-head, the one-stage head that is deployed (Sec. 3.3)."""

from typing import Callable, Dict, List, Mapping, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from kd_d2.losses.precision import full_precision

from .align import AlignLayer, build_align, init_gaussian, init_he, init_xavier
from .cells import gather_cells
from .options import choice
from .outputs import HeadOutput
from .prior import init_background
from .rows import hardest_rows, positive_rows
from .variants import head_variant

__all__ = ["MimicSHead"]

_INITS = {"gaussian": init_gaussian, "he": init_he, "xavier": init_xavier}


class MimicSHead(nn.Module):
    """Alignment layer, one or two 1x1 projections, two 1x1 predictors, ReLUs between (ours).

    There is one anchor, hence one adjusted box, per cell. The 1x1 layers are shared by all levels
    (ours), alignment layers by the levels of equal kernel. Biases start from 0, predictors'
    weights from N(0, 0.01).
    """

    @configurable
    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        align: Mapping[int, AlignLayer],
        kernels: Sequence[int],
        box2box_transform: Box2BoxTransform,
        split: bool = True,
        feature_dim: int = 1024,
        init: str = "gaussian",
        prior_prob: float = 0.0,
        detach_deltas: bool = True,
        gather_first: bool = True,
        cls_topk: int = 128,
        max_pos_reg: int = 64,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        box_reg_loss_weight: float = 1.0,
        test_score_thresh: float = 0.005,
        test_nms_thresh: float = 0.6,
        test_topk_per_image: int = 100,
    ):
        """
        Args:
            channels: C of the pyramid.
            num_classes: K.
            align: layer for each kernel size.
            kernels: kernel size of each level, finest first.
            box2box_transform: coding of the second regression, the T-head's.
            split: whether classification and regression have a projection each.
            feature_dim: D, width of the projections.
            init: initial weights of alignment and projections: "gaussian", N(0, 0.01) as in the
                paper, "he", N(0, sqrt(2 / fan_in)), or "xavier", variance 1 / fan_in.
            prior_prob: initial probability of an object of any class, see :func:`init_background`.
            detach_deltas: no gradient reaches the refinement module through the offsets.
            gather_first: run the 1x1 layers on the given boxes only instead of on all cells.
                Results are equal.
            cls_topk: boxes of an image with the largest classification loss that are learnt from.
            max_pos_reg: most positives of an image in the regression loss.
            smooth_l1_beta, box_reg_loss_type, box_reg_loss_weight: as of
                ``FastRCNNOutputLayers``; the T-head's.
            test_score_thresh, test_nms_thresh, test_topk_per_image: of ``fast_rcnn_inference``.

        Raises:
            ValueError: ``cls_topk`` or ``max_pos_reg`` is not positive, or ``init`` unknown.
        """
        super().__init__()
        initialise = choice("S_HEAD.INIT", init, _INITS)
        for key, value in (("CLS_TOPK", cls_topk), ("MAX_POS_REG", max_pos_reg)):
            if value < 1:
                raise ValueError(f"MODEL.MIMICDET.S_HEAD.{key} must be positive, got {value}")
        self.align = nn.ModuleDict({str(size): layer for size, layer in align.items()})
        self.kernels = [int(size) for size in kernels]
        self.projections = nn.ModuleList(
            nn.Conv2d(channels, feature_dim, 1) for _ in range(2 if split else 1)
        )
        self.cls_score = nn.Conv2d(feature_dim, num_classes + 1, 1)
        self.bbox_pred = nn.Conv2d(feature_dim, 4, 1)
        for layer in (*(layer.conv for layer in self.align.values()), *self.projections):
            initialise(layer)
        for layer in (self.cls_score, self.bbox_pred):
            init_gaussian(layer)
        init_background(self.cls_score, prior_prob, "S_HEAD.PRIOR_PROB")

        self.num_classes = num_classes
        self.detach_deltas = detach_deltas
        self.gather_first = gather_first
        self.cls_topk = cls_topk
        self.max_pos_reg = max_pos_reg
        self.box2box_transform = box2box_transform
        self._box_loss = {
            "box_reg_loss_type": box_reg_loss_type,
            "smooth_l1_beta": smooth_l1_beta,
        }
        self.box_reg_loss_weight = box_reg_loss_weight
        self.test_score_thresh = test_score_thresh
        self.test_nms_thresh = test_nms_thresh
        self.test_topk_per_image = test_topk_per_image

    @classmethod
    def from_config(cls, cfg, input_shape: Sequence[ShapeSpec]):
        """
        Args:
            input_shape: of each level of ``MODEL.RPN.IN_FEATURES``.

        Raises:
            ValueError: the number of kernels is not that of the levels.
        """
        node, heads = cfg.MODEL.MIMICDET.S_HEAD, cfg.MODEL.ROI_HEADS
        box_head = cfg.MODEL.ROI_BOX_HEAD
        if len(node.KERNELS) != len(input_shape):
            raise ValueError(
                f"MODEL.MIMICDET.S_HEAD.KERNELS {list(node.KERNELS)} must have one kernel for each "
                f"of the {len(input_shape)} levels of MODEL.RPN.IN_FEATURES"
            )
        channels = input_shape[0].channels
        return {
            "channels": channels,
            "num_classes": heads.NUM_CLASSES,
            "align": {
                size: build_align(cfg, channels=channels, kernel_size=size)
                for size in sorted(set(node.KERNELS))
            },
            "kernels": node.KERNELS,
            "box2box_transform": Box2BoxTransform(weights=box_head.BBOX_REG_WEIGHTS),
            "split": head_variant(cfg).split,
            "feature_dim": node.FEAT_DIM,
            "init": node.INIT,
            "prior_prob": node.PRIOR_PROB,
            "detach_deltas": node.DETACH_DELTAS,
            "gather_first": node.GATHER_FIRST,
            "cls_topk": node.CLS_TOPK,
            "max_pos_reg": node.MAX_POS_REG,
            "smooth_l1_beta": box_head.SMOOTH_L1_BETA,
            "box_reg_loss_type": box_head.BBOX_REG_LOSS_TYPE,
            "box_reg_loss_weight": box_head.BBOX_REG_LOSS_WEIGHT,
            "test_score_thresh": heads.SCORE_THRESH_TEST,
            "test_nms_thresh": heads.NMS_THRESH_TEST,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def num_branches(self) -> int:
        """2 if classification and regression have a feature vector each, else 1."""
        return len(self.projections)

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.cls_score.in_channels

    def forward(self, features: List[Tensor], deltas: List[Tensor]) -> List[Tensor]:
        """Return the aligned maps after their ReLU, (N, C, H, W) fp32 per level.

        Args:
            features: (N, C, H, W) per level.
            deltas: (N, 4, H, W) per level, raw output of the refinement module.
        """
        levels = zip(self._aligners(), features, self._guides(deltas))
        return [F.relu(align(*inputs)) for align, *inputs in levels]

    def offsets(self, features: List[Tensor], deltas: List[Tensor]) -> List[Tensor]:
        """Return the offsets of :meth:`forward` in cells, (N, 2k^2, H, W) per level.

        Layout: :mod:`.offsets`.
        """
        levels = zip(self._aligners(), features, self._guides(deltas))
        return [align.offsets(*map(full_precision, inputs)) for align, *inputs in levels]

    def predict(self, aligned: List[Tensor], proposals: List[Instances]) -> HeadOutput:
        """Return features and predictions of the boxes, those of all images in order.

        Args:
            aligned: of :meth:`forward`.
            proposals: N images with ``anchor_index``, the cell where a box comes from.
        """
        cells = [x.anchor_index for x in proposals]
        if self.gather_first:
            output = self._pointwise(gather_cells(aligned, cells), _on_rows)
        else:
            dense = [self._pointwise(level, _on_maps) for level in aligned]
            output = (gather_cells(list(maps), cells) for maps in zip(*dense))
        return HeadOutput(*map(full_precision, output))

    def losses(self, output: HeadOutput, labelled: List[Instances]) -> Dict[str, Tensor]:
        """Return ``loss_s_cls`` and ``loss_s_reg``.

        The former is the mean cross-entropy of the hardest ``cls_topk`` boxes of each image,
        positives and negatives together. The latter is the L1 distance of up to ``max_pos_reg``
        random positives of each image, divided by the number of boxes in the former, so that a
        positive weighs as much as in the T-head (ours).

        Args:
            output: of :meth:`predict` for the same boxes.
            labelled: the whole proposal set, with ``proposal_boxes``, ``gt_classes`` (background
                K) and ``gt_boxes``.
        """
        gt_classes = torch.cat([x.gt_classes for x in labelled])
        num_boxes = [len(x) for x in labelled]
        cross_entropy = F.cross_entropy(output.logits, gt_classes, reduction="none")
        hardest = hardest_rows(cross_entropy, num_boxes, self.cls_topk)
        count = max(len(hardest), 1)

        positives = positive_rows(gt_classes, num_boxes, self.max_pos_reg, self.num_classes)
        boxes = torch.cat([x.proposal_boxes.tensor for x in labelled])[positives]
        gt_boxes = torch.cat([x.gt_boxes.tensor for x in labelled])[positives]
        box_loss = _dense_box_regression_loss(
            [boxes],
            self.box2box_transform,
            [output.deltas[positives][None]],
            [gt_boxes],
            ...,
            **self._box_loss,
        )
        return {
            "loss_s_cls": cross_entropy[hardest].sum() / count,
            "loss_s_reg": self.box_reg_loss_weight * box_loss / count,
        }

    def inference(self, output: HeadOutput, proposals: List[Instances]) -> List[Instances]:
        """Return detections of each image: ``pred_boxes``, ``scores``, ``pred_classes``.

        The score is the softmax alone; the refinement's score only chose the boxes (ours).

        Args:
            output: of :meth:`predict` for the same boxes.
            proposals: with ``proposal_boxes``, the clipped adjusted boxes.
        """
        num_boxes = [len(x) for x in proposals]
        adjusted = torch.cat([x.proposal_boxes.tensor for x in proposals])
        boxes = self.box2box_transform.apply_deltas(output.deltas, adjusted)
        detections, _ = fast_rcnn_inference(
            boxes.split(num_boxes),
            output.logits.softmax(dim=-1).split(num_boxes),
            [x.image_size for x in proposals],
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
        )
        return detections

    def _aligners(self) -> List[AlignLayer]:
        return [self.align[str(size)] for size in self.kernels]

    def _guides(self, deltas: List[Tensor]) -> List[Tensor]:
        return [x.detach() for x in deltas] if self.detach_deltas else deltas

    def _pointwise(
        self, x: Tensor, apply: Callable[[nn.Conv2d, Tensor], Tensor]
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both features before their ReLU, logits and deltas; ``apply`` runs a 1x1 layer on x."""
        vectors = [apply(projection, x) for projection in self.projections]
        cls_feature, reg_feature = vectors[0], vectors[-1]
        logits = apply(self.cls_score, F.relu(cls_feature))
        deltas = apply(self.bbox_pred, F.relu(reg_feature))
        return cls_feature, reg_feature, logits, deltas


def _on_maps(layer: nn.Conv2d, maps: Tensor) -> Tensor:
    return layer(maps)


def _on_rows(layer: nn.Conv2d, rows: Tensor) -> Tensor:
    """The 1x1 convolution ``layer`` as a linear map of (R, C) rows."""
    return F.linear(rows, layer.weight.flatten(1), layer.bias)
