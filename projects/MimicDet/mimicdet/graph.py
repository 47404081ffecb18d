"""The one-stage detector as a function of tensors, for ONNX and TorchScript."""

import copy

import torch
from detectron2.layers import cat
from detectron2.structures import Instances

from kd_d2.export.graph import DetectionGraph, clip, gather_rows, is_nonempty, register_graph
from kd_d2.export.operators import PYTORCH
from kd_d2.export.second_stage import detections_of_classes
from kd_d2.modeling.layers import bounded_topk

__all__ = ["MimicDetGraph"]


@register_graph("MimicDet")
class MimicDetGraph(DetectionGraph):
    """Refinement module and S-head."""

    def __init__(self, model, operators=PYTORCH):
        super().__init__(model, operators)
        self.s_head = copy.deepcopy(model.s_head)
        for layer in self.s_head.align.values():
            layer.deform_conv = operators.deform_conv

    def check(self, model):
        if model.evaluate_t_head:
            raise ValueError(
                "MODEL.MIMICDET.EVAL_HEAD is 'teacher', but a graph can only be made of the S-head."
            )

    @property
    def settings(self):
        head = self.model.s_head
        return {
            "score_threshold": head.test_score_thresh,
            "nms_threshold": head.test_nms_thresh,
            "max_detections": head.test_topk_per_image,
            "proposals": self.model.refinement.num_proposals,
        }

    def detect(self, images, size):
        model = self.model
        features = model.pyramid(images, with_t_head=False)
        anchors, deltas, logits, flat_deltas = model.refinement.predict(features)
        boxes = cat(model.refinement._decode_proposals(anchors, flat_deltas), dim=1)
        _, cells = bounded_topk(cat(logits, dim=1), model.refinement.num_proposals)
        boxes = clip(gather_rows(boxes, cells), size)
        aligned = self.s_head([features[name] for name in model.head_in_features], deltas)
        scores, deltas = self._predict(aligned, cells)
        decoded = self.s_head.box2box_transform.apply_deltas(deltas, boxes.flatten(0, 1))
        return detections_of_classes(
            decoded.view(boxes.shape[0], -1, 1, 4),
            scores.view(boxes.shape[0], -1, scores.shape[-1]),
            is_nonempty(boxes, model.refinement.min_box_size),
            size,
            self.suppress,
            score_thresh=self.s_head.test_score_thresh,
            nms_thresh=self.s_head.test_nms_thresh,
            limit=self.max_detections,
        )

    def _predict(self, aligned, cells):
        """Probabilities (N * P, K) and deltas (N * P, 4) of the boxes from ``cells``, (N, P)."""
        # All images side by side are one image of that many cells to the head.
        rows = torch.cat([x.flatten(2) for x in aligned], dim=2)  # (N, C, A)
        image = torch.arange(rows.shape[0], device=rows.device)[:, None]
        index = (cells + image * rows.shape[2]).flatten()
        row = rows.transpose(0, 1).flatten(1)[None, :, None]
        # the size is not read
        output = self.s_head.predict([row], [Instances((0, 0), anchor_index=index)])
        return output.logits.softmax(dim=-1)[:, :-1], output.deltas
