"""What GFL and ATSS have in common: one square anchor per cell, assigned by ATSS."""

from typing import Any, Dict, List, Sequence, Tuple

import torch
from detectron2.layers import batched_nms
from detectron2.modeling import Backbone, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ..layers import ATSSAssigner, valid_anchor_mask

__all__ = ["ATSSAssignedDetector"]


class ATSSAssignedDetector(DenseDetector):
    """Base of detectors with one anchor per cell and ATSS assignment.

    A subclass supplies :meth:`losses` and :meth:`scores`; its head returns raw predictions.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        anchor_generator: nn.Module,
        box2box_transform,
        assigner: ATSSAssigner,
        num_classes: int,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
    ):
        """
        Args:
            backbone: its outputs include ``head_in_features``.
            head: maps a list of levels to lists of raw predictions: logits (N, K, Hi, Wi),
                boxes (N, box_dim, Hi, Wi), possibly more.
            head_in_features: names of the levels, finest first.
            anchor_generator: one anchor per cell; attributes ``strides`` and ``offset``.
            box2box_transform: ``apply_deltas``, ``get_deltas`` and ``box_dim``.
            assigner: assigns boxes to anchors.
            num_classes: K.
            test_score_thresh: detections need a class score above this.
            test_topk_candidates: kept per level before NMS.
            test_nms_thresh: IoU above which the weaker of two detections of a class is dropped.
            max_detections_per_image: kept after NMS.
            pixel_mean, pixel_std: per channel, in the order of ``input_format``.
            input_format: channel order of the images, "BGR" or "RGB".
        """
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.assigner = assigner
        self.num_classes = num_classes
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.input_format = input_format

    @classmethod
    def common_arguments(cls, cfg, node) -> Dict[str, Any]:
        """Constructor arguments that do not depend on the kind of detector, without the head.

        Args:
            cfg: the whole config.
            node: the detector's, e.g. ``cfg.MODEL.GFL``.

        Raises:
            ValueError: the backbone lacks one of ``IN_FEATURES``, or a number is out of range.
        """
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        missing = [name for name in node.IN_FEATURES if name not in shapes]
        if missing or not node.IN_FEATURES:
            raise ValueError(
                f"IN_FEATURES {list(node.IN_FEATURES)} must name outputs of the backbone "
                f"{cfg.MODEL.BACKBONE.NAME}, which has {list(shapes)}"
            )
        if node.ANCHOR_SCALE <= 0:
            raise ValueError(f"ANCHOR_SCALE must be positive, got {node.ANCHOR_SCALE}")
        strides = [shapes[name].stride for name in node.IN_FEATURES]
        return {
            "backbone": backbone,
            "head_in_features": node.IN_FEATURES,
            # Centred on (x, y) * stride, not on the middle of the cell.
            "anchor_generator": DefaultAnchorGenerator(
                sizes=[[node.ANCHOR_SCALE * stride] for stride in strides],
                aspect_ratios=[1.0],
                strides=strides,
                offset=0.0,
            ),
            "assigner": ATSSAssigner(node.ATSS_TOPK),
            "num_classes": node.NUM_CLASSES,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
        }

    @torch.no_grad()
    def label_anchors(
        self, anchors: List[Boxes], gt_instances: List[Instances]
    ) -> Tuple[List[Tensor], List[Tensor]]:
        """Labels and boxes that the anchors of each image are trained towards.

        Depends on the arguments only; may be called any number of times.

        Args:
            anchors: per level (Ri, 4), XYXY in absolute pixels of the padded batch.
            gt_instances: per image, with ``gt_boxes`` and ``gt_classes``; ``image_size`` is the
                size before padding.

        Returns:
            Two lists with one entry per image, R = sum of Ri:
            int64 (R,) labels: class 0..K-1, K for background, -1 for cells that only exist
            because of larger images in the batch, see :func:`valid_anchor_mask`;
            (R, 4) boxes, zero except for anchors with a class.
        """
        all_labels, all_boxes = [], []
        for instances in gt_instances:
            valid = valid_anchor_mask(
                anchors,
                self.anchor_generator.strides,
                instances.image_size,
                self.backbone.size_divisibility,
                self.anchor_generator.offset,
            )
            matched = self.assigner(anchors, instances.gt_boxes, valid)
            # One more row for unmatched anchors, so that images without boxes need no branch.
            classes = instances.gt_classes.new_full((len(instances) + 1,), self.num_classes)
            classes[:-1] = instances.gt_classes
            boxes = instances.gt_boxes.tensor.new_zeros((len(instances) + 1, 4))
            boxes[:-1] = instances.gt_boxes.tensor
            rows = torch.where(matched >= 0, matched, len(instances))
            all_labels.append(torch.where(valid, classes[rows], -1))
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
            images: N padded images.
            features: levels that ``predictions`` were made from.
            predictions: raw outputs of the head: logits, boxes and, where it has one, centerness.
            gt_instances: per image ``gt_boxes`` and ``gt_classes``.
        """
        dims = [self.num_classes, self.box2box_transform.box_dim, 1][: len(predictions)]
        transposed = self._transpose_dense_predictions(predictions, dims)
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, *transposed, gt_labels, gt_boxes)

    def losses(self, anchors: List[Boxes], *predictions_and_targets) -> Dict[str, Tensor]:
        """Weighted losses from anchors, transposed predictions, labels and matched boxes."""
        raise NotImplementedError

    def scores(self, predictions: List[List[Tensor]]) -> List[List[Tensor]]:
        """Scores by which detections are chosen and ranked.

        Args:
            predictions: raw outputs of the head, transposed to (..., Ri, K) or (..., Ri, 1), of
                one image or of several, without the boxes: logits, and what else the head
                predicts.

        Returns:
            Per level (..., Ri, K); only scores above 0 are detections.
        """
        raise NotImplementedError

    def forward_inference(
        self, images: ImageList, features: List[Tensor], predictions: List[List[Tensor]]
    ) -> List[Instances]:
        """Detections of each image; the raw predictions are left as they are.

        Args:
            images: N padded images.
            features: levels that ``predictions`` were made from.
            predictions: raw outputs of the head.

        Returns:
            N instances with ``pred_boxes`` in pixels of the network's input, ``scores`` and
            ``pred_classes``, best first.
        """
        dims = [self.num_classes, self.box2box_transform.box_dim] + [1] * (len(predictions) - 2)
        logits, deltas, *others = self._transpose_dense_predictions(predictions, dims)
        anchors = self.anchor_generator(features)
        results = []
        for index, image_size in enumerate(images.image_sizes):
            scores = self.scores([[x[index] for x in levels] for levels in (logits, *others)])
            results.append(
                self.inference_single_image(anchors, scores, [x[index] for x in deltas], image_size)
            )
        return results

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
            scores: per level (Ri, K), result of :meth:`scores`.
            deltas: per level (Ri, box_dim).
            image_size: (height, width) before padding.

        Returns:
            At most ``max_detections_per_image`` detections, best first.
        """
        found = self._decode_multi_level_predictions(
            anchors, scores, deltas, 0.0, self.test_topk_candidates, image_size
        )
        keep = batched_nms(
            found.pred_boxes.tensor, found.scores, found.pred_classes, self.test_nms_thresh
        )
        return found[keep[: self.max_detections_per_image]]
