"""FCOS, as in the paper and as in Detectron2."""

from typing import Any, Dict, List, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from fvcore.nn import giou_loss, sigmoid_focal_loss
from torch import Tensor, nn
from torch.nn import functional as F

from kd_d2.losses.box import iou_log_loss

from ..layers import DistributionBox2BoxTransform, apply_score_factor, centerness, reduce_mean
from .dense_head import DenseHead

__all__ = ["FCOS", "FCOS_PRESETS", "PointBox2BoxTransform", "fcos_switches"]

# Values of the switches of MODEL.FCOS; what they mean is said there.
FCOS_PRESETS = {
    "paper": {
        "CENTERNESS_ON": "cls",
        "NORM_BY_STRIDE": False,
        "USE_SCALE": True,
        "CONV_BIAS": False,
        "CENTER_RADIUS": 0.0,
        "MATCHER": "paper",
        "BOX_LOSS": "iou",
        "CTR_WEIGHTED_BOX": True,
        "NORMALIZER": "count",
        "SCORE_MODE": "mul",
        "SCORE_THRESH_TEST": 0.05,
        "NMS_THRESH_TEST": 0.5,
    },
    "d2": {
        "CENTERNESS_ON": "reg",
        "NORM_BY_STRIDE": True,
        "USE_SCALE": False,
        "CONV_BIAS": True,
        "CENTER_RADIUS": 1.5,
        "MATCHER": "d2",
        "BOX_LOSS": "giou",
        "CTR_WEIGHTED_BOX": False,
        "NORMALIZER": "ema",
        "SCORE_MODE": "sqrt",
        "SCORE_THRESH_TEST": 0.2,
        "NMS_THRESH_TEST": 0.6,
    },
}
_CHOICES = {
    "CENTERNESS_ON": ("cls", "reg", "none"),
    "MATCHER": ("paper", "d2"),
    "BOX_LOSS": ("iou", "giou"),
    "NORMALIZER": ("count", "ema"),
    "SCORE_MODE": ("mul", "sqrt"),
}
# The largest object of a level has its far side this many strides from the point.
_RANGE_IN_STRIDES = 8.0
# exp(16) is 9e6 pixels: no image is that large, and areas of such boxes are finite in fp32.
_MAX_EXPONENT = 16.0


def fcos_switches(node) -> Dict[str, Any]:
    """The switches of ``MODEL.FCOS`` with their values: set ones as set, others by the preset.

    Args:
        node: ``cfg.MODEL.FCOS``.

    Raises:
        ValueError: unknown preset, a switch without value in "custom", or an unknown value.
    """
    presets = {**FCOS_PRESETS, "custom": {}}
    if node.PRESET not in presets:
        raise ValueError(f"MODEL.FCOS.PRESET is {node.PRESET!r}, must be one of {list(presets)}")
    values = {}
    for key in FCOS_PRESETS["paper"]:
        value = node[key] if node[key] is not None else presets[node.PRESET].get(key)
        if value is None:
            raise ValueError(f"MODEL.FCOS.PRESET is 'custom', so MODEL.FCOS.{key} must be set")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ValueError(f"MODEL.FCOS.{key} is {value!r}, must be one of {_CHOICES[key]}")
        values[key] = value
    for key in ("CENTER_RADIUS", "SCORE_THRESH_TEST", "NMS_THRESH_TEST"):
        if values[key] < 0:
            raise ValueError(f"MODEL.FCOS.{key} is {values[key]}, must not be negative")
    return values


class PointBox2BoxTransform:
    """Boxes as distances of their four sides from a point, the centre of a square anchor.

    Attributes:
        box_dim: 4, numbers per box: left, top, right, bottom.
        norm_by_stride: see the constructor.
    """

    box_dim = 4

    def __init__(self, norm_by_stride: bool):
        """
        Args:
            norm_by_stride: True: a raw prediction x means relu(x) times the side of the anchor
                (which is the stride); False: exp(x) pixels, eq. 2 ff. of FCOS.
        """
        self.norm_by_stride = norm_by_stride

    @staticmethod
    def _centers(boxes: Tensor) -> Tensor:
        return 0.5 * (boxes[:, :2] + boxes[:, 2:])

    @staticmethod
    def _sides(boxes: Tensor) -> Tensor:
        return (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Distances left, top, right, bottom from the points to the sides of the boxes.

        Args:
            src_boxes: (R, 4) anchors, XYXY, pixels.
            target_boxes: (R, 4) boxes, XYXY, pixels.

        Returns:
            (R, 4) in strides if ``norm_by_stride``, else in pixels (not their logarithm);
            negative where the point is outside.
        """
        points = self._centers(src_boxes)
        distances = torch.cat([points - target_boxes[:, :2], target_boxes[:, 2:] - points], dim=1)
        return distances / self._sides(src_boxes) if self.norm_by_stride else distances

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes that raw predictions stand for.

        Args:
            deltas: (R, 4) raw predictions, any floating point type.
            boxes: (R, 4) anchors, XYXY, pixels.

        Returns:
            (R, 4) fp32 (fp64 for fp64) XYXY in pixels, never inverted.
        """
        deltas = deltas if deltas.dtype == torch.float64 else deltas.float()
        boxes = boxes.to(deltas.dtype)
        if self.norm_by_stride:
            distances = deltas.relu() * self._sides(boxes)
        else:
            distances = deltas.clamp(max=_MAX_EXPONENT).exp()
        points = self._centers(boxes)
        return torch.cat([points - distances[:, :2], points + distances[:, 2:]], dim=1)


def _coder(reg_max: int, norm_by_stride: bool):
    if reg_max:
        return DistributionBox2BoxTransform(reg_max, anchor_scale=1.0)
    return PointBox2BoxTransform(norm_by_stride)


@META_ARCH_REGISTRY.register()
class FCOS(DenseDetector):
    """FCOS (Tian et al., ICCV 2019) with the variants between the paper and Detectron2.

    With ``MODEL.FCOS.PRESET`` "d2" it computes what Detectron2's FCOS computes. Unlike there,
    inference leaves the raw predictions as they are and losses are computed in fp32.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        num_classes: int,
        norm_by_stride: bool = False,
        center_radius: float = 0.0,
        matcher: str = "paper",
        box_loss: str = "iou",
        ctr_weighted_box: bool = True,
        normalizer: str = "count",
        score_mode: str = "mul",
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        reg_max: int = 0,
        dfl_loss_weight: float = 0.25,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
    ):
        """
        Args:
            backbone: its outputs include ``head_in_features``.
            head: maps a list of levels to lists of raw predictions: logits (N, K, Hi, Wi),
                distances (N, 4, Hi, Wi), or distributions (N, 4 * (n + 1), Hi, Wi), and, unless it
                has none, centerness (N, 1, Hi, Wi).
            head_in_features: names of the levels, finest first.
            num_classes: K.
            norm_by_stride: how distances are expressed, see :class:`PointBox2BoxTransform`.
            center_radius: in strides, 0 for none; see ``MODEL.FCOS.CENTER_RADIUS``.
            matcher: "paper" or "d2"; see ``MODEL.FCOS.MATCHER``.
            box_loss: "iou" or "giou".
            ctr_weighted_box: weight the box loss by the centerness target.
            normalizer: "count" or "ema"; see ``MODEL.FCOS.NORMALIZER``.
            score_mode: "mul" or "sqrt"; see ``MODEL.FCOS.SCORE_MODE``.
            focal_loss_alpha, focal_loss_gamma: of the classification loss.
            reg_max: n, largest distance in strides if boxes are distributions; 0: they are not.
            dfl_loss_weight: of the distribution focal loss, with ``reg_max``.
            test_score_thresh: candidates need a score above this.
            test_topk_candidates: kept per level before NMS.
            test_nms_thresh: IoU above which the weaker of two detections of a class is dropped.
            max_detections_per_image: kept after NMS.
            pixel_mean, pixel_std: per channel, in the order of ``input_format``.
            input_format: channel order of the images, "BGR" or "RGB".
        """
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.num_classes = num_classes
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in head_in_features]
        # A point is a square of the stride's size around it: ((x + 1/2) s, (y + 1/2) s).
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides],
            aspect_ratios=[1.0],
            strides=strides,
            offset=0.5,
        )
        self.box2box_transform = _coder(reg_max, norm_by_stride)
        self.dfl_loss_weight = dfl_loss_weight
        self.center_radius = float(center_radius)
        self.matcher = matcher
        self.box_loss = box_loss
        self.ctr_weighted_box = ctr_weighted_box
        self.normalizer = normalizer
        self.score_mode = score_mode
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.FCOS
        switches = fcos_switches(node)
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        missing = [name for name in node.IN_FEATURES if name not in shapes]
        if missing or not node.IN_FEATURES:
            raise ValueError(
                f"MODEL.FCOS.IN_FEATURES {list(node.IN_FEATURES)} must name outputs of the "
                f"backbone {cfg.MODEL.BACKBONE.NAME}, which has {list(shapes)}"
            )
        head = DenseHead(
            input_shape=[shapes[name] for name in node.IN_FEATURES],
            num_classes=node.NUM_CLASSES,
            box_dim=_coder(node.REG_MAX, switches["NORM_BY_STRIDE"]).box_dim,
            num_convs=node.NUM_CONVS,
            conv_dim=node.CONV_DIM,
            norm=node.NORM,
            conv_bias=switches["CONV_BIAS"],
            prior_prob=node.PRIOR_PROB,
            centerness_on=switches["CENTERNESS_ON"],
            use_scale=switches["USE_SCALE"],
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "norm_by_stride": switches["NORM_BY_STRIDE"],
            "center_radius": switches["CENTER_RADIUS"],
            "matcher": switches["MATCHER"],
            "box_loss": switches["BOX_LOSS"],
            "ctr_weighted_box": switches["CTR_WEIGHTED_BOX"],
            "normalizer": switches["NORMALIZER"],
            "score_mode": switches["SCORE_MODE"],
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "reg_max": node.REG_MAX,
            "dfl_loss_weight": node.DFL_LOSS_WEIGHT,
            "test_score_thresh": switches["SCORE_THRESH_TEST"],
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": switches["NMS_THRESH_TEST"],
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    # Training

    def forward_training(self, images, features, predictions, gt_instances) -> Dict[str, Tensor]:
        """Losses of the batch, see :meth:`losses`."""
        anchors = self.anchor_generator(features)
        labels, boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, self._transpose(predictions), labels, boxes)

    def _transpose(self, predictions: List[List[Tensor]]) -> List[List[Tensor]]:
        dims = [self.num_classes, self.box2box_transform.box_dim, 1]
        return self._transpose_dense_predictions(predictions, dims[: len(predictions)])

    @torch.no_grad()
    def label_anchors(
        self, anchors: List[Boxes], gt_instances: List[Instances]
    ) -> Tuple[List[Tensor], List[Tensor]]:
        """Labels and boxes that the points of each image are trained towards.

        A point is assigned to a box it lies inside of (not on the border), whose farthest side
        is in the range of the point's level, and in whose central region it lies if there is
        one; to the smallest of several. Positions in the padding are background like any other.
        Depends on the arguments only; may be called any number of times.

        Args:
            anchors: per level (Ri, 4), XYXY in absolute pixels of the padded batch.
            gt_instances: per image, with ``gt_boxes`` (M, 4) and ``gt_classes`` (M,).

        Returns:
            Two lists with one entry per image, R = sum of Ri:
            int64 (R,) labels: class 0..K-1, K for background;
            (R, 4) boxes; those of the background are defined but mean nothing.
        """
        lower, upper = self._size_ranges(anchors)
        all_anchors = Boxes.cat(anchors).tensor
        points = 0.5 * (all_anchors[:, :2] + all_anchors[:, 2:])
        strides = all_anchors[:, 2] - all_anchors[:, 0]
        labels, boxes = [], []
        for instances in gt_instances:
            if len(instances) == 0:
                labels.append(
                    torch.full(
                        points.shape[:1], self.num_classes, dtype=torch.int64, device=points.device
                    )
                )
                boxes.append(torch.zeros_like(all_anchors))
                continue
            gt_boxes = instances.gt_boxes.tensor  # (M, 4)
            distances = torch.cat(
                [points[None] - gt_boxes[:, None, :2], gt_boxes[:, None, 2:] - points[None]], dim=2
            )  # (M, R, 4)
            matched = distances.amin(dim=2) > 0
            farthest = distances.amax(dim=2)
            if self.matcher == "paper":
                matched &= (farthest >= lower) & (farthest <= upper)
            else:
                matched &= (farthest > lower) & (farthest < upper)
            if self.center_radius > 0:
                centers = 0.5 * (gt_boxes[:, :2] + gt_boxes[:, 2:])
                offsets = (points[None] - centers[:, None]).abs().amax(dim=2)
                matched &= offsets < self.center_radius * strides
            costs = (gt_boxes[:, 2] - gt_boxes[:, 0]) * (gt_boxes[:, 3] - gt_boxes[:, 1])
            if self.matcher == "d2":
                costs = costs - 1e8  # rounds to 8 pixels^2 like Detectron2's match quality
            costs = costs[:, None].expand_as(matched).masked_fill(~matched, float("inf"))
            best, rows = costs.min(dim=0)
            classes = instances.gt_classes[rows]
            labels.append(torch.where(best < float("inf"), classes, self.num_classes))
            boxes.append(gt_boxes[rows])
        return labels, boxes

    @staticmethod
    def _size_ranges(anchors: List[Boxes]) -> Tuple[Tensor, Tensor]:
        # (R,) smallest and largest distance of the farthest side, in pixels: up to 8 strides of
        # the own level, from 8 strides of the level below on.
        lower, upper = [], []
        for level, boxes in enumerate(anchors):
            stride = boxes.tensor[:, 2] - boxes.tensor[:, 0]
            first, last = level == 0, level == len(anchors) - 1
            lower.append(torch.zeros_like(stride) if first else stride * (_RANGE_IN_STRIDES / 2))
            upper.append(
                torch.full_like(stride, float("inf")) if last else stride * _RANGE_IN_STRIDES
            )
        return torch.cat(lower), torch.cat(upper)

    def losses(
        self,
        anchors: List[Boxes],
        predictions: List[List[Tensor]],
        gt_labels: List[Tensor],
        gt_boxes: List[Tensor],
    ) -> Dict[str, Tensor]:
        """Focal loss, box loss at positives, binary cross-entropy of their centerness.

        Args:
            anchors: per level (Ri, 4).
            predictions: per output and level (N, Ri, K), (N, Ri, box_dim) and maybe (N, Ri, 1),
                raw.
            gt_labels: per image (R,), K for background.
            gt_boxes: per image (R, 4).

        Returns:
            ``loss_fcos_cls`` and, with centerness, ``loss_fcos_ctr``, divided by the normaliser
            (``MODEL.FCOS.NORMALIZER``); ``loss_fcos_loc``, divided by it or by the sum of its
            weights, averaged over ranks (``CTR_WEIGHTED_BOX``); if boxes are distributions
            ``loss_fcos_dfl``, mean over the sides, weighted and divided like that one. All fp32;
            without positives all but the first are 0.
        """
        with torch.autocast(anchors[0].device.type, enabled=False):
            logits, deltas, *ctr = [torch.cat(levels, dim=1).float() for levels in predictions]
            labels, boxes = torch.stack(gt_labels), torch.stack(gt_boxes)
            num_images, all_anchors = len(labels), Boxes.cat(anchors).tensor
            positive = labels != self.num_classes
            count = positive.sum()
            get_event_storage().put_scalar("num_pos_anchors", count.item() / num_images)
            normalizer = self._loss_normalizer(count)

            targets = F.one_hot(labels, self.num_classes + 1)[..., :-1].to(logits.dtype)
            loss_cls = sigmoid_focal_loss(
                logits,
                targets,
                alpha=self.focal_loss_alpha,
                gamma=self.focal_loss_gamma,
                reduction="sum",
            )

            pos_anchors = all_anchors.expand(num_images, -1, -1)[positive]
            pos_boxes = boxes[positive]
            ctr_targets = centerness(self.box2box_transform.get_deltas(pos_anchors, pos_boxes))
            pos_deltas = deltas[positive]
            box_losses = self._box_losses(
                self.box2box_transform.apply_deltas(pos_deltas, pos_anchors), pos_boxes
            )
            weights, total = torch.ones_like(ctr_targets), normalizer
            if self.ctr_weighted_box:
                weights, total = ctr_targets, reduce_mean(ctr_targets.sum()).clamp(min=1e-6)
            losses = {
                "loss_fcos_cls": loss_cls / normalizer,
                "loss_fcos_loc": (box_losses * weights).sum() / total,
            }
            if self.box2box_transform.box_dim > 4:
                dfl = self.box2box_transform.focal_loss(pos_deltas, pos_anchors, pos_boxes)
                losses["loss_fcos_dfl"] = self.dfl_loss_weight * (dfl * weights).sum() / total
            if ctr:
                loss_ctr = F.binary_cross_entropy_with_logits(
                    ctr[0].squeeze(2)[positive], ctr_targets, reduction="sum"
                )
                losses["loss_fcos_ctr"] = loss_ctr / normalizer
        return losses

    def _loss_normalizer(self, num_positives: Tensor):
        if self.normalizer == "ema":
            return self._ema_update("loss_normalizer", max(num_positives.item(), 1), 300)
        return reduce_mean(num_positives.float()).clamp(min=1)

    def _box_losses(self, predicted: Tensor, target: Tensor) -> Tensor:
        # (P, 4), (P, 4) -> (P,)
        if self.box_loss == "giou":
            return giou_loss(predicted, target)
        return iou_log_loss(predicted, target)

    # Inference

    def forward_inference(
        self, images: ImageList, features: List[Tensor], predictions: List[List[Tensor]]
    ) -> List[Instances]:
        """Detections of each image; the raw predictions are left as they are.

        Returns:
            N instances with ``pred_boxes`` in pixels of the network's input, ``scores`` and
            ``pred_classes``, best first.
        """
        anchors = self.anchor_generator(features)
        logits, deltas, *ctr = self._transpose(predictions)
        results = []
        for index, image_size in enumerate(images.image_sizes):
            scores, threshold = self.scores(
                [x[index] for x in logits], [[x[index] for x in levels] for levels in ctr]
            )
            results.append(
                self.inference_single_image(
                    anchors, scores, [x[index] for x in deltas], image_size, threshold
                )
            )
        return results

    def scores(self, logits: List[Tensor], ctr: List[List[Tensor]]) -> Tuple[List[Tensor], float]:
        """Scores by which detections are chosen and ranked.

        Args:
            logits: per level (..., Ri, K), of one image or of several.
            ctr: the centerness logits, (..., Ri, 1) per level, in a list; empty: there is none.

        Returns:
            per level (..., Ri, K), and the threshold that is still to be applied to them.
        """
        scores = [x.sigmoid() for x in logits]
        if not ctr:
            return scores, self.test_score_thresh
        factors = [x.sigmoid() for x in ctr[0]]
        if self.score_mode == "sqrt":
            # Eq. 4 of the FCOS journal version (arXiv 2006.09214).
            return [(s * f).sqrt() for s, f in zip(scores, factors)], self.test_score_thresh
        chosen = [
            apply_score_factor(s, f, self.test_score_thresh, self.test_topk_candidates)
            for s, f in zip(scores, factors)
        ]
        return chosen, 0.0

    def inference_single_image(
        self,
        anchors: List[Boxes],
        scores: List[Tensor],
        deltas: List[Tensor],
        image_size: Tuple[int, int],
        threshold: float,
    ) -> Instances:
        """Decodes, selects and suppresses the candidates of one image.

        Args:
            anchors: per level (Ri, 4).
            scores: per level (Ri, K).
            deltas: per level (Ri, 4), raw.
            image_size: (height, width) before padding.
            threshold: candidates have a score above this.

        Returns:
            At most ``max_detections_per_image`` detections, best first.
        """
        found = self._decode_multi_level_predictions(
            anchors, scores, deltas, threshold, self.test_topk_candidates, image_size
        )
        keep = batched_nms(
            found.pred_boxes.tensor, found.scores, found.pred_classes, self.test_nms_thresh
        )
        return found[keep[: self.max_detections_per_image]]
