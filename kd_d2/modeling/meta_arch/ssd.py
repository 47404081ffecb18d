"""Single Shot MultiBox Detector."""

from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn
from torch.nn import functional as F

from kd_d2.losses.hard_negative import hard_negative_cross_entropy

from ..layers import DefaultBoxGenerator, SSDMatcher
from .ssd_head import SSDHead

__all__ = ["SSD"]


@META_ARCH_REGISTRY.register()
class SSD(DenseDetector):
    """SSD (Liu et al., ECCV 2016) as mmdetection and DICOD have it.

    The network sees square images of one size; boxes are in pixels of that square. Class scores
    are a softmax over K + 1 classes, the background last.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        anchor_generator: DefaultBoxGenerator,
        box2box_transform: Box2BoxTransform,
        matcher: SSDMatcher,
        num_classes: int,
        input_size: int,
        neg_pos_ratio: float = 3.0,
        smooth_l1_beta: float = 1.0,
        cls_loss_weight: float = 1.0,
        box_loss_weight: float = 1.0,
        test_score_thresh: float = 0.02,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.45,
        max_detections_per_image: int = 200,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
    ):
        """
        Args:
            backbone: all of its maps are used, in the order of its ``output_shape``.
            head: maps the list of maps to per-level logits and deltas, see :class:`SSDHead`.
            anchor_generator: default boxes of the maps.
            box2box_transform: between default boxes and boxes.
            matcher: assigns ground-truth boxes, given IoUs.
            num_classes: K.
            input_size: S, side of the network's input in pixels.
            neg_pos_ratio: negatives per positive in the class loss.
            smooth_l1_beta: of the box loss.
            cls_loss_weight, box_loss_weight: of the two losses.
            test_score_thresh: detections need a class score above this.
            test_topk_candidates: default boxes kept per level, by their best class.
            test_nms_thresh: IoU above which the weaker of two detections of a class is dropped.
            max_detections_per_image: kept after NMS.
            pixel_mean, pixel_std: per channel, in the order of ``input_format``.
            input_format: channel order of the images, "BGR" or "RGB".
        """
        super().__init__(
            backbone,
            head,
            list(backbone.output_shape()),
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.matcher = matcher
        self.num_classes = num_classes
        self.input_size = input_size
        self.neg_pos_ratio = neg_pos_ratio
        self.smooth_l1_beta = smooth_l1_beta
        self.cls_loss_weight = cls_loss_weight
        self.box_loss_weight = box_loss_weight
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SSD
        backbone = build_backbone(cfg)
        shapes = list(backbone.output_shape().values())
        if len(shapes) != len(node.STRIDES):
            raise ValueError(
                f"MODEL.SSD.STRIDES has {len(node.STRIDES)} entries, but the backbone "
                f"{cfg.MODEL.BACKBONE.NAME} has the {len(shapes)} maps "
                f"{list(backbone.output_shape())}"
            )
        if hasattr(backbone, "map_sizes"):
            backbone.map_sizes(node.INPUT_SIZE)
        if node.NEG_POS_RATIO < 0:
            raise ValueError(f"MODEL.SSD.NEG_POS_RATIO must not be negative: {node.NEG_POS_RATIO}")
        generator = DefaultBoxGenerator(
            sizes=node.SIZES, aspect_ratios=node.ASPECT_RATIOS, strides=node.STRIDES
        )
        return {
            "backbone": backbone,
            "head": SSDHead(
                in_channels=[shape.channels for shape in shapes],
                num_anchors=generator.num_anchors,
                num_classes=node.NUM_CLASSES,
            ),
            "anchor_generator": generator,
            "box2box_transform": Box2BoxTransform(weights=tuple(node.BBOX_REG_WEIGHTS)),
            "matcher": SSDMatcher(node.IOU_THRESH),
            "num_classes": node.NUM_CLASSES,
            "input_size": node.INPUT_SIZE,
            "neg_pos_ratio": node.NEG_POS_RATIO,
            "smooth_l1_beta": node.SMOOTH_L1_BETA,
            "cls_loss_weight": node.CLS_LOSS_WEIGHT,
            "box_loss_weight": node.BOX_LOSS_WEIGHT,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def preprocess_image(self, batched_inputs: List[Dict[str, Tensor]]) -> ImageList:
        """Normalised images of S x S pixels, (N, C, S, S).

        Another size is stretched in fp32, bilinearly and without antialiasing, as the mapper does;
        ``detector_postprocess`` undoes it, x and y separately.

        Raises:
            ValueError: another size in training, where boxes would have to follow.
        """
        size = (self.input_size, self.input_size)
        images = [self._move_to_current_device(x["image"]).float() for x in batched_inputs]
        wrong = [tuple(x.shape[-2:]) for x in images if x.shape[-2:] != size]
        if wrong and self.training:
            raise ValueError(
                f"SSD is trained on images of {size[0]}x{size[1]} pixels (MODEL.SSD.INPUT_SIZE), "
                f"got {wrong[0][0]}x{wrong[0][1]}; set INPUT.MAPPER to 'SSDMapper'"
            )
        images = [x if x.shape[-2:] == size else _stretched(x, size) for x in images]
        return ImageList.from_tensors([(x - self.pixel_mean) / self.pixel_std for x in images])

    @torch.no_grad()
    def label_anchors(
        self, anchors: List[Boxes], gt_instances: List[Instances]
    ) -> Tuple[List[Tensor], List[Tensor]]:
        """Labels and boxes that the default boxes of each image are trained towards.

        Depends on the arguments only; may be called any number of times.

        Args:
            anchors: per level (Ri, 4).
            gt_instances: per image, with ``gt_boxes`` and ``gt_classes``.

        Returns:
            Two lists with one entry per image, R = sum of Ri: int64 (R,) labels, class 0..K-1 or
            K for background; (R, 4) boxes, zero except for default boxes with a class.
        """
        default_boxes = Boxes.cat(anchors)
        all_labels, all_boxes = [], []
        for instances in gt_instances:
            matched = self.matcher(pairwise_iou(instances.gt_boxes, default_boxes))
            # One more row for the background, so that images without boxes need no branch.
            classes = instances.gt_classes.new_full((len(instances) + 1,), self.num_classes)
            classes[:-1] = instances.gt_classes
            boxes = instances.gt_boxes.tensor.new_zeros((len(instances) + 1, 4))
            boxes[:-1] = instances.gt_boxes.tensor
            rows = torch.where(matched >= 0, matched, len(instances))
            all_labels.append(classes[rows])
            all_boxes.append(boxes[rows])
        return all_labels, all_boxes

    def forward_training(
        self,
        images: ImageList,
        features: List[Tensor],
        predictions: Sequence[List[Tensor]],
        gt_instances: List[Instances],
    ) -> Dict[str, Tensor]:
        """Losses of one batch; see :meth:`losses`.

        Args:
            images: N images.
            features: maps that ``predictions`` were made from.
            predictions: raw outputs of the head.
            gt_instances: per image ``gt_boxes`` and ``gt_classes``.
        """
        logits, deltas = self._rows(predictions)
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, deltas, gt_labels, gt_boxes)

    def losses(
        self,
        anchors: List[Boxes],
        pred_logits: List[Tensor],
        pred_deltas: List[Tensor],
        gt_labels: List[Tensor],
        gt_boxes: List[Tensor],
    ) -> Dict[str, Tensor]:
        """Weighted losses, in fp32.

        Class: cross-entropy of positives and mined negatives. Boxes: smooth L1 of the deltas of
        the positives, summed over the four. Both are sums over the images of this process divided
        by sum_i max(n_i, 1), with n_i positives in image i; nothing is averaged over processes.

        Args:
            anchors: per level (Ri, 4).
            pred_logits: per level (N, Ri, K + 1).
            pred_deltas: per level (N, Ri, 4).
            gt_labels, gt_boxes: per image (R,) and (R, 4), see :meth:`label_anchors`.

        Returns:
            Scalars "loss_ssd_cls" and "loss_ssd_box".
        """
        labels, boxes = torch.stack(gt_labels), torch.stack(gt_boxes)
        is_positive = labels != self.num_classes
        image, row = is_positive.nonzero(as_tuple=True)  # each (P,)
        divisor = is_positive.sum(dim=1).clamp(min=1).sum()

        with torch.autocast(labels.device.type, enabled=False):
            logits = torch.cat(pred_logits, dim=1).float()
            deltas = torch.cat(pred_deltas, dim=1)[image, row].float()
            targets = self.box2box_transform.get_deltas(
                Boxes.cat(anchors).tensor[row], boxes[image, row]
            )
            loss_cls = hard_negative_cross_entropy(logits, labels, self.neg_pos_ratio)
            loss_box = smooth_l1_loss(deltas, targets, self.smooth_l1_beta, reduction="sum")
            losses = {
                "loss_ssd_cls": self.cls_loss_weight * loss_cls / divisor,
                "loss_ssd_box": self.box_loss_weight * loss_box / divisor,
            }
        get_event_storage().put_scalar("num_pos_anchors", len(row) / len(gt_labels))
        return losses

    def forward_inference(
        self, images: ImageList, features: List[Tensor], predictions: List[List[Tensor]]
    ) -> List[Instances]:
        """Detections of each image; the raw predictions are left as they are.

        Args:
            images: N images.
            features: maps that ``predictions`` were made from.
            predictions: raw outputs of the head.

        Returns:
            N instances with ``pred_boxes`` in pixels of the network's input, ``scores`` and
            ``pred_classes``, best first.
        """
        logits, deltas = self._rows(predictions)
        anchors = self.anchor_generator(features)
        scores = [x.float().softmax(dim=-1)[..., :-1] for x in logits]
        return [
            self.inference_single_image(
                anchors, [x[index] for x in scores], [x[index].float() for x in deltas], image_size
            )
            for index, image_size in enumerate(images.image_sizes)
        ]

    def inference_single_image(
        self,
        anchors: List[Boxes],
        scores: List[Tensor],
        deltas: List[Tensor],
        image_size: Tuple[int, int],
    ) -> Instances:
        """Decodes, selects and suppresses the candidates of one image.

        Args:
            anchors: per level (Ri, 4).
            scores: per level (Ri, K), probabilities.
            deltas: per level (Ri, 4).
            image_size: (height, width).

        Returns:
            At most ``max_detections_per_image`` detections, best first.
        """
        chosen_boxes, chosen_scores = [], []
        for level_anchors, level_scores, level_deltas in zip(anchors, scores, deltas):
            count = min(self.test_topk_candidates, len(level_scores))
            best = level_scores.amax(dim=1).topk(count).indices
            chosen_scores.append(level_scores[best])
            chosen_boxes.append(
                self.box2box_transform.apply_deltas(level_deltas[best], level_anchors.tensor[best])
            )
        boxes, all_scores = Boxes(torch.cat(chosen_boxes)), torch.cat(chosen_scores)
        boxes.clip(image_size)
        rows, classes = (all_scores > self.test_score_thresh).nonzero(as_tuple=True)
        found = Instances(
            image_size,
            pred_boxes=boxes[rows],
            scores=all_scores[rows, classes],
            pred_classes=classes,
        )
        keep = batched_nms(found.pred_boxes.tensor, found.scores, classes, self.test_nms_thresh)
        return found[keep[: self.max_detections_per_image]]

    def _rows(self, predictions: Sequence[List[Tensor]]) -> List[List[Tensor]]:
        """Per level logits (N, Ri, K + 1) and deltas (N, Ri, 4), in the order of the anchors."""
        return self._transpose_dense_predictions(predictions, [self.num_classes + 1, 4])


def _stretched(image: Tensor, size: Tuple[int, int]) -> Tensor:
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
