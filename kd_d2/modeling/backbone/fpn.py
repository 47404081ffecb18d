"""Feature pyramids P3..P7 with a choice of what P6 is made from."""

from typing import Sequence, Type

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import (
    BACKBONE_REGISTRY,
    FPN,
    Backbone,
    build_resnet_backbone,
)
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from .batch_norm import use_eval_statistics

__all__ = ["ExtraLevels", "build_fpn", "build_kd_resnet_fpn_backbone"]

_BN_MODES = ("", "eval_affine")
_P6_SOURCES = ("c5", "p5")


class ExtraLevels(LastLevelP6P7):
    """Top block that appends P6 and P7, with or without a ReLU between them.

    Parameter names are those of Detectron2's ``LastLevelP6P7``.

    Args:
        in_channels: channels of the map P6 is computed from.
        out_channels: channels C of P6 and P7.
        in_feature: name of that map, of the bottom-up network or of the pyramid.
        p7_relu: True as in Detectron2; False as in mmdetection's RetinaNet, GFL and ATSS.
    """

    def __init__(self, in_channels: int, out_channels: int, in_feature: str, p7_relu: bool):
        super().__init__(in_channels, out_channels, in_feature)
        self.p7_relu = p7_relu

    def forward(self, x):
        """Return [P6, P7], (N,C,H/2,W/2) and (N,C,H/4,W/4), of ``x`` (N,in_channels,H,W)."""
        p6 = self.p6(x)
        p7 = self.p7(F.relu(p6) if self.p7_relu else p6)
        return [p6, p7]


def build_fpn(
    bottom_up: Backbone,
    *,
    in_features: Sequence[str],
    out_channels: int,
    norm: str = "",
    fuse_type: str = "sum",
    p6_source: str = "c5",
    p7_relu: bool = True,
    fpn_class: Type[FPN] = FPN,
) -> FPN:
    """Return Detectron2's FPN over ``bottom_up`` with two extra levels on top.

    With ``p6_source="c5", p7_relu=True`` it equals Detectron2's RetinaNet pyramid; the state-dict
    keys are the same in all cases.

    Args:
        bottom_up: network whose maps are fused.
        in_features: names of its maps, finest first, each stride twice the one before.
        out_channels: channels of every level.
        norm: normalisation of lateral and output convs, a name that ``get_norm`` knows or "".
        fuse_type: "sum" or "avg".
        p6_source: "c5" (last of ``in_features``) or "p5" (coarsest level of the pyramid).
        p7_relu: ReLU between P6 and P7.
        fpn_class: a subclass that is constructed in the same way.

    Raises:
        ValueError: unknown ``p6_source``, or ``in_features`` that ``bottom_up`` does not have.
    """
    shapes = bottom_up.output_shape()
    unknown = [name for name in in_features if name not in shapes]
    if unknown or not in_features:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {list(in_features)}, but the bottom-up network returns "
            f"{list(shapes)}"
        )
    if p6_source not in _P6_SOURCES:
        raise ValueError(f"MODEL.FPN.P6_SOURCE is {p6_source!r}, must be one of {_P6_SOURCES}")
    last = shapes[in_features[-1]]
    if p6_source == "c5":
        top_in, top_channels = in_features[-1], last.channels
    else:
        top_in, top_channels = f"p{last.stride.bit_length() - 1}", out_channels
    return fpn_class(
        bottom_up=bottom_up,
        in_features=list(in_features),
        out_channels=out_channels,
        norm=norm,
        top_block=ExtraLevels(top_channels, out_channels, top_in, p7_relu),
        fuse_type=fuse_type,
    )


def build_fpn_from_config(cfg, bottom_up: Backbone, fpn_class: Type[FPN] = FPN) -> FPN:
    """Return the pyramid that ``cfg.MODEL.FPN`` describes, over ``bottom_up``."""
    node = cfg.MODEL.FPN
    return build_fpn(
        bottom_up,
        in_features=node.IN_FEATURES,
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        fuse_type=node.FUSE_TYPE,
        p6_source=node.P6_SOURCE,
        p7_relu=node.P7_RELU,
        fpn_class=fpn_class,
    )


def build_resnet_from_config(cfg, input_shape: ShapeSpec) -> Backbone:
    """Return Detectron2's ResNet (18 to 152), its batch norms as ``MODEL.RESNETS.BN_MODE`` says.

    Raises:
        ValueError: unknown ``MODEL.RESNETS.BN_MODE``, or "eval_affine" without ``NORM`` "BN".
    """
    mode, norm = cfg.MODEL.RESNETS.BN_MODE, cfg.MODEL.RESNETS.NORM
    if mode not in _BN_MODES:
        raise ValueError(f"MODEL.RESNETS.BN_MODE is {mode!r}, must be one of {_BN_MODES}")
    if mode == "eval_affine" and norm != "BN":
        raise ValueError(
            "MODEL.RESNETS.BN_MODE 'eval_affine' needs MODEL.RESNETS.NORM 'BN', "
            f"but NORM is {norm!r}"
        )
    bottom_up = build_resnet_backbone(cfg, input_shape)
    return use_eval_statistics(bottom_up) if mode == "eval_affine" else bottom_up


@BACKBONE_REGISTRY.register()
def build_kd_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Return Detectron2's ResNet (18 to 152) below a pyramid P3..P7.

    Raises:
        ValueError: unknown ``MODEL.RESNETS.BN_MODE``, or "eval_affine" without ``NORM`` "BN".
    """
    return build_fpn_from_config(cfg, build_resnet_from_config(cfg, input_shape))
