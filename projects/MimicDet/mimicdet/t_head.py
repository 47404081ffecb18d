"""The T-head, a two-stage head that exists for training (Sec. 3.3)."""

from typing import Dict, List, Sequence, Tuple

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, ROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from kd_d2.losses.precision import full_precision

from .outputs import HeadOutput
from .pooler import LevelROIPooler
from .prior import init_background
from .variants import head_variant

__all__ = ["MimicTHead", "TwoFeatureOutputLayers"]


class TwoFeatureOutputLayers(FastRCNNOutputLayers):
    """Detectron2's output layers with a feature vector for each of the two predictions."""

    def forward(self, features: Tuple[Tensor, Tensor]) -> Tuple[Tensor, Tensor]:
        """Return logits (R, K+1) and deltas (R, 4) of two (R, D) features after their ReLU."""
        cls_feature, reg_feature = features
        return self.cls_score(cls_feature), self.bbox_pred(reg_feature)


@ROI_HEADS_REGISTRY.register()
class MimicTHead(ROIHeads):
    """RoIAlign, one or two branches, two predictors.

    Initialisation: convolutions and fully connected layers as the paper (He; Detectron2's
    ``c2_msra_fill`` and ``c2_xavier_fill``), predictors N(0, 0.01) and N(0, 0.001) as Detectron2,
    because He-sized logits of 81 classes start with a large loss (ours). ``prior_prob`` sets the
    background's bias.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        pooler: LevelROIPooler,
        branches: Sequence[FastRCNNConvFCHead],
        predictor: TwoFeatureOutputLayers,
        prior_prob: float = 0.0,
        **kwargs,
    ):
        """
        Args:
            in_features: names of the levels that are pooled from, finest first.
            pooler: of these levels.
            branches: one for both predictions, or those of classification and regression; each
                ends with a ReLU.
            predictor: class-agnostic in its deltas.
            prior_prob: initial probability of an object of any class, see :func:`init_background`.
            kwargs: of ``ROIHeads``; they matter in :meth:`forward` only.
        """
        super().__init__(**kwargs)
        self.in_features = list(in_features)
        self.pooler = pooler
        self.branches = nn.ModuleList(branches)
        self.predictor = predictor
        init_background(predictor.cls_score, prior_prob, "T_HEAD.PRIOR_PROB")

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        """
        Raises:
            ValueError: the deltas are not class-agnostic, or the levels of both heads do not pair.
        """
        heads, box_head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
        if not box_head.CLS_AGNOSTIC_BBOX_REG:
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False, but MimicDet's heads predict "
                "one box for all classes: set it to True"
            )
        if len(heads.IN_FEATURES) != len(cfg.MODEL.RPN.IN_FEATURES):
            raise ValueError(
                f"MODEL.ROI_HEADS.IN_FEATURES {heads.IN_FEATURES} and MODEL.RPN.IN_FEATURES "
                f"{cfg.MODEL.RPN.IN_FEATURES} must have equally many levels, because a box of the "
                "i-th level of the latter is pooled from the i-th of the former"
            )
        shapes = [input_shape[name] for name in heads.IN_FEATURES]
        pooled = ShapeSpec(
            channels=shapes[0].channels,
            height=box_head.POOLER_RESOLUTION,
            width=box_head.POOLER_RESOLUTION,
        )
        return {
            **super().from_config(cfg),
            "in_features": heads.IN_FEATURES,
            "pooler": LevelROIPooler(
                output_size=box_head.POOLER_RESOLUTION,
                scales=tuple(1.0 / shape.stride for shape in shapes),
                sampling_ratio=box_head.POOLER_SAMPLING_RATIO,
                pooler_type=box_head.POOLER_TYPE,
                level_assign=cfg.MODEL.MIMICDET.T_HEAD.LEVEL_ASSIGN,
            ),
            "branches": [
                FastRCNNConvFCHead(
                    pooled,
                    conv_dims=[box_head.CONV_DIM] * branch.num_convs,
                    fc_dims=[box_head.FC_DIM] * branch.num_fcs,
                    conv_norm=box_head.NORM,
                )
                for branch in head_variant(cfg).branches
            ],
            "predictor": TwoFeatureOutputLayers(cfg, ShapeSpec(channels=box_head.FC_DIM)),
            "prior_prob": cfg.MODEL.MIMICDET.T_HEAD.PRIOR_PROB,
        }

    @property
    def num_branches(self) -> int:
        """2 if classification and regression have a feature vector each, else 1."""
        return len(self.branches)

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.predictor.cls_score.in_features

    def features(self, feature_list: List[Tensor], proposals: List[Instances]) -> HeadOutput:
        """Return features and predictions of the boxes.

        Args:
            feature_list: (N, C, H, W) per level of ``in_features``.
            proposals: N images with ``proposal_boxes`` and ``level`` (see the pooler).
        """
        pooled = self.pooler(feature_list, proposals)
        vectors = [_before_last_relu(branch, pooled) for branch in self.branches]
        cls_feature, reg_feature = vectors[0], vectors[-1]
        predictions = self.predictor((F.relu(cls_feature), F.relu(reg_feature)))
        return HeadOutput(*map(full_precision, (cls_feature, reg_feature, *predictions)))

    def losses(self, output: HeadOutput, labelled: List[Instances]) -> Dict[str, Tensor]:
        """Return ``loss_t_cls`` (CE) and ``loss_t_reg`` (L1), both divided by the number of boxes.

        Args:
            output: of :meth:`features` for the same boxes.
            labelled: with ``proposal_boxes``, ``gt_classes`` (background K) and ``gt_boxes``.
        """
        losses = self.predictor.losses((output.logits, output.deltas), labelled)
        return {"loss_t_cls": losses["loss_cls"], "loss_t_reg": losses["loss_box_reg"]}

    def inference(self, feature_list: List[Tensor], proposals: List[Instances]) -> List[Instances]:
        """Return detections of each image: ``pred_boxes``, ``scores``, ``pred_classes``.

        Arguments as in :meth:`features`. Thresholds: ``MODEL.ROI_HEADS.*_TEST``.
        """
        output = self.features(feature_list, proposals)
        detections, _ = self.predictor.inference((output.logits, output.deltas), proposals)
        return detections

    def forward(self, images, features: Dict[str, Tensor], proposals, targets=None):
        """The interface of Detectron2's ROI heads: ``(proposals, losses)``.

        In training proposals are labelled and sampled here, by ``MODEL.ROI_HEADS.*``.
        ``MimicDet`` calls the methods above instead, since both heads share labels and samples.
        """
        feature_list = [features[name] for name in self.in_features]
        if not self.training:
            return self.inference(feature_list, proposals), {}
        proposals = self.label_and_sample_proposals(proposals, targets)
        return proposals, self.losses(self.features(feature_list, proposals), proposals)


def _before_last_relu(branch: FastRCNNConvFCHead, x: Tensor) -> Tensor:
    """What enters the last layer of ``branch``, which is a ReLU."""
    for layer in list(branch)[:-1]:
        x = layer(x)
    return x
