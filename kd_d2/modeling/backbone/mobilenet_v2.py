"""MobileNetV2 as a Detectron2 backbone."""

from typing import Dict, Sequence

import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torchvision.models import MobileNetV2 as TorchvisionMobileNetV2

from .fpn import build_fpn_from_config

__all__ = [
    "MobileNetV2",
    "build_mobilenetv2_fpn_backbone",
    "build_mobilenetv2_rcnn_fpn_backbone",
]

# Index of the last layer of each stage in torchvision's `features`; the stride doubles from one
# stage to the next. mmdetection taps the same layers (24, 32, 96 and 1280 channels).
_STAGE_ENDS = (1, 3, 6, 13, 18)
# The last inverted residual (320 channels), and the 1x1 conv behind it (1280 channels).
_LAST_LAYERS = (17, 18)
_NAMES = {"res2": 2, "res3": 3, "res4": 4, "res5": 5}


class MobileNetV2(Backbone):
    """torchvision's MobileNetV2 (Sandler et al., CVPR 2018) without its classifier.

    Parameters keep torchvision's names (``features.<layer>...``).

    Args:
        width_mult: multiplies all channel numbers.
        norm: normalisation after every conv, a name that ``get_norm`` knows.
        freeze_at: number of stages (strides 2, 4, ... 32) that are not trained.
        out_features: names among "res2" (stride 4) ... "res5" (stride 32).
        last_layer: index of the layer that is "res5": 17, or 18 as in mmdetection. With 17 layer 18
            does not exist.

    Raises:
        ValueError: unknown or no output names, ``freeze_at`` outside 0..5, a ``width_mult`` that
            is not positive, or another ``last_layer``.
    """

    def __init__(
        self,
        *,
        width_mult: float = 1.0,
        norm: str = "BN",
        freeze_at: int = 0,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        last_layer: int = 18,
    ):
        super().__init__()
        if not out_features or any(name not in _NAMES for name in out_features):
            raise ValueError(
                f"MODEL.MOBILENET_V2.OUT_FEATURES is {list(out_features)}, "
                f"must be among {list(_NAMES)}"
            )
        if not 0 <= freeze_at <= len(_STAGE_ENDS):
            raise ValueError(f"MODEL.MOBILENET_V2.FREEZE_AT is {freeze_at}, must be in 0..5")
        if width_mult <= 0:
            raise ValueError(f"MODEL.MOBILENET_V2.WIDTH_MULT is {width_mult}, must be > 0")
        if last_layer not in _LAST_LAYERS:
            raise ValueError(
                f"MODEL.MOBILENET_V2.LAST_LAYER is {last_layer}, must be one of {_LAST_LAYERS}"
            )
        layers = TorchvisionMobileNetV2(
            width_mult=width_mult, norm_layer=lambda channels: get_norm(norm, channels)
        ).features
        self._stage_ends = (*_STAGE_ENDS[:-1], last_layer)
        self._stage_of_layer = {
            self._stage_ends[stage - 1]: name
            for name, stage in _NAMES.items()
            if name in out_features
        }
        # Layers beyond the last output would be trained by nothing.
        self.features = layers[: max(self._stage_of_layer) + 1]
        self._out_features = [name for name in _NAMES if name in out_features]
        self._out_feature_strides = {name: 2 ** _NAMES[name] for name in self._out_features}
        self._out_feature_channels = {
            name: _output_channels(self.features[layer])
            for layer, name in self._stage_of_layer.items()
        }
        if freeze_at > 0:
            self._freeze(self._stage_ends[freeze_at - 1] + 1)

    def _freeze(self, num_layers: int) -> None:
        for index in range(min(num_layers, len(self.features))):
            layer = FrozenBatchNorm2d.convert_frozen_batchnorm(self.features[index])
            for parameter in layer.parameters():
                parameter.requires_grad_(False)

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return the maps ``out_features`` of the images ``x`` (N,3,H,W)."""
        outputs = {}
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._stage_of_layer:
                outputs[self._stage_of_layer[index]] = x
        return outputs


def _output_channels(layer: torch.nn.Module) -> int:
    convs = [m for m in layer.modules() if isinstance(m, torch.nn.Conv2d)]
    return convs[-1].out_channels


def _bottom_up(cfg, input_shape: ShapeSpec) -> MobileNetV2:
    if input_shape.channels != 3:
        raise ValueError(f"MobileNetV2 takes 3 channels, MODEL.PIXEL_MEAN has {input_shape}")
    node = cfg.MODEL.MOBILENET_V2
    return MobileNetV2(
        width_mult=node.WIDTH_MULT,
        norm=node.NORM,
        freeze_at=node.FREEZE_AT,
        out_features=node.OUT_FEATURES,
        last_layer=node.LAST_LAYER,
    )


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Return MobileNetV2 below a pyramid P3..P7, for dense detectors.

    Raises:
        ValueError: the input does not have 3 channels, or the keys are out of range.
    """
    return build_fpn_from_config(cfg, _bottom_up(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_rcnn_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Return MobileNetV2 below the pyramid of Detectron2's Faster R-CNN: one level for each of
    MODEL.FPN.IN_FEATURES, and one by subsampling on top, P2..P6 for "res2" to "res5".

    Raises:
        ValueError: the input does not have 3 channels, the keys are out of range, or
            MODEL.FPN.IN_FEATURES are not among MODEL.MOBILENET_V2.OUT_FEATURES.
    """
    bottom_up = _bottom_up(cfg, input_shape)
    node = cfg.MODEL.FPN
    absent = [name for name in node.IN_FEATURES if name not in bottom_up.output_shape()]
    if absent or not node.IN_FEATURES:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {list(node.IN_FEATURES)}, must be some of "
            f"MODEL.MOBILENET_V2.OUT_FEATURES {list(bottom_up.output_shape())}"
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=list(node.IN_FEATURES),
        out_channels=node.OUT_CHANNELS,
        norm=node.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=node.FUSE_TYPE,
    )
