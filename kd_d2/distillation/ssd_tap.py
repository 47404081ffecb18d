"""Tap of SSD: maps of different widths, predictors without towers, a softmax with background."""

from kd_d2.modeling.meta_arch import SSD

from .dense_tap import DenseTap, anchor_signature, codec_signature
from .taps import KD_TAPS, KeyInfo, Tap

__all__ = ["SSDTap"]


@KD_TAPS.register_for(SSD)
class SSDTap(DenseTap):
    """``neck`` are the maps that the head reads, conv4_3 behind its normalisation included.

    There is no ``head.*``: predictors sit on the maps. ``pred.cls`` has K + 1 logits a default
    box, the background last; levels differ in the number of default boxes per cell and hence in
    channels.
    """

    def keys(self, model):
        head, strides = model.head, tuple(model.anchor_generator.strides)
        shapes = model.backbone.output_shape()
        result = self.trunk_keys(model)
        result["neck"] = KeyInfo(tuple(shapes[f].channels for f in model.head_in_features), strides)
        result["pred.cls"] = KeyInfo(
            tuple(conv.out_channels for conv in head.cls_score),
            strides,
            (model.num_classes + 1, "softmax"),
        )
        result["pred.box"] = KeyInfo(tuple(conv.out_channels for conv in head.bbox_pred), strides)
        result["anchors"] = KeyInfo(None, strides, anchor_signature(model.anchor_generator))
        result["codec"] = KeyInfo(None, (), codec_signature(model.box2box_transform))
        result["assign"] = KeyInfo(None, strides)
        return result

    def num_stages(self, model, branch):
        return 0

    # the predictors are the whole head
    rest_of_head = Tap.rest_of_head
