"""Backbones that Detectron2 lacks; importing registers their builders."""

from .batch_norm import EvalStatsBatchNorm2d, use_eval_statistics
from .fpn import ExtraLevels, build_fpn, build_kd_resnet_fpn_backbone
from .mobilenet_v2 import (
    MobileNetV2,
    build_mobilenetv2_fpn_backbone,
    build_mobilenetv2_rcnn_fpn_backbone,
)
from .swin_fpn import Swin, build_swin_fpn_backbone
from .vgg_ssd import SSDVGG, build_ssd_vgg_backbone

__all__ = [
    "EvalStatsBatchNorm2d",
    "ExtraLevels",
    "MobileNetV2",
    "SSDVGG",
    "Swin",
    "build_fpn",
    "build_kd_resnet_fpn_backbone",
    "build_mobilenetv2_fpn_backbone",
    "build_mobilenetv2_rcnn_fpn_backbone",
    "build_ssd_vgg_backbone",
    "build_swin_fpn_backbone",
    "use_eval_statistics",
]
