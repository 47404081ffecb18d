"""Graphs of dense detectors: the best scores of each level are decoded and suppressed by class."""

from typing import List, Sequence, Tuple

import torch
from torch import Tensor

from kd_d2.modeling.layers import bounded_topk

from .graph import NONE, DetectionGraph, gather_rows, register_graph

__all__ = ["ATSSAssignedGraph", "DenseGraph", "FCOSGraph", "RetinaNetGraph"]


class DenseGraph(DetectionGraph):
    """Base of the graphs of detectors whose head rates every anchor.

    A subclass says how wide the head's outputs are and what its scores are.
    """

    @property
    def settings(self):
        model = self.model
        return {
            "score_threshold": model.test_score_thresh,
            "nms_threshold": model.test_nms_thresh,
            "max_detections": model.max_detections_per_image,
            "candidates_per_level": model.test_topk_candidates,
        }

    @property
    def box_dim(self) -> int:
        """Numbers that the head predicts per box."""
        return self.model.box2box_transform.box_dim

    def scores(self, logits: List[Tensor], *others: List[Tensor]) -> Tuple[List[Tensor], float]:
        """Scores of all images, and the value that those of candidates are above.

        Args:
            logits: (N, Ri, K) per level.
            others: (N, Ri, 1) per level, of each further output of the head.

        Returns:
            (N, Ri, K) per level, and the threshold.
        """
        raise NotImplementedError

    def detect(self, images, size):
        model = self.model
        features = model.backbone(images)
        features = [features[name] for name in model.head_in_features]
        predictions = model.head(features)
        widths = [model.num_classes, self.box_dim] + [1] * (len(predictions) - 2)
        logits, deltas, *others = model._transpose_dense_predictions(predictions, widths)
        scores, threshold = self.scores(logits, *others)
        levels = [
            self._candidates(*level, threshold)
            for level in zip((x.tensor for x in model.anchor_generator(features)), scores, deltas)
        ]
        boxes, scores, classes = (torch.cat(parts, dim=1) for parts in zip(*levels))
        return boxes, self._suppressed(boxes, scores, classes), classes

    def _candidates(
        self, anchors: Tensor, scores: Tensor, deltas: Tensor, threshold: float
    ) -> Sequence[Tensor]:
        """Boxes, scores and classes of a level's best, (N, M, 4), (N, M) and (N, M)."""
        best, index = bounded_topk(scores.flatten(1), self.model.test_topk_candidates)
        cells = torch.div(index, self.model.num_classes, rounding_mode="floor")
        boxes = self.model.box2box_transform.apply_deltas(
            gather_rows(deltas, cells).flatten(0, 1), anchors[cells.flatten()]
        )
        best = torch.where(best > threshold, best, torch.full_like(best, NONE))
        return boxes.view(best.shape[0], -1, 4), best, index - cells * self.model.num_classes

    def _suppressed(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
        """The scores, :data:`NONE` where a better box of the same class overlaps too much."""
        groups = torch.arange(self.model.num_classes, device=classes.device)[:, None]
        candidates = (classes[:, None] == groups) & (scores[:, None] > NONE / 2)
        keep = self.suppress(
            boxes,
            scores[:, None].expand_as(candidates),
            candidates,
            self.model.test_nms_thresh,
            self.max_detections,
        )
        return torch.where(keep.any(dim=1), scores, torch.full_like(scores, NONE))


@register_graph("RetinaNet")
class RetinaNetGraph(DenseGraph):
    """Detectron2's RetinaNet."""

    box_dim = 4

    def scores(self, logits):
        return [x.sigmoid() for x in logits], self.model.test_score_thresh


@register_graph("FCOS")
class FCOSGraph(DenseGraph):
    """FCOS of this library, all presets."""

    def scores(self, logits, *ctr):
        return self.model.scores(logits, list(ctr))


@register_graph("GFL", "ATSS")
class ATSSAssignedGraph(DenseGraph):
    """GFL and ATSS."""

    def scores(self, logits, *ctr):
        # What is no candidate has the score 0 already.
        return self.model.scores([logits, *ctr]), 0.0
