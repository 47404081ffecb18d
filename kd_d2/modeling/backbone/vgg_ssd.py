"""VGG as SSD uses it: dilated conv6 and conv7, and extra levels on top."""

from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone
from torch import nn

from ..layers import L2Norm

__all__ = ["SSDVGG", "build_ssd_vgg_backbone"]


class SSDVGG(Backbone):
    """VGG without its classifier, conv6, conv7 and the extra levels of SSD.

    Without norm and with the default widths ``features`` has torchvision's layers up to index 29
    (conv5_3), then pool5, conv6, ReLU, conv7, ReLU at 30 to 34. The maps are conv4_3 behind
    :class:`L2Norm`, conv7, and one per entry of ``extras``: conv8_2, conv9_2, ...

    Nothing is in place, so that maps inside can be observed.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: Sequence[int] = (64, 128, 256, 512, 512),
        depths: Sequence[int] = (2, 2, 3, 3, 3),
        conv7_channels: int = 1024,
        dilation: int = 6,
        extras: Sequence[Sequence[int]],
        strides: Sequence[int],
        norm: str = "",
        l2norm_init: float = 20.0,
    ):
        """
        Args:
            in_channels: of the image.
            channels: widths of the five blocks.
            depths: 3x3 convs of the five blocks.
            conv7_channels: width of conv6 and conv7.
            dilation: of conv6.
            extras: per extra level (width of the 1x1 conv, width, kernel, stride, padding).
            strides: pixels per cell that the maps are said to have, one entry a map; a map of one
                cell has none of its own.
            norm: after every conv, a name that ``get_norm`` knows; "" for none, as published.
            l2norm_init: scale of conv4_3.

        Raises:
            ValueError: lists of wrong length.
        """
        super().__init__()
        _check_lengths(channels, depths, extras, strides)
        layers: List[nn.Module] = []
        for block, (width, depth) in enumerate(zip(channels, depths)):
            for _ in range(depth):
                layers += _conv(in_channels, width, norm, kernel_size=3, padding=1)
                in_channels = width
            if block == 3:
                self._conv4_3 = len(layers) - 1
            last = block == 4
            layers.append(nn.MaxPool2d(3, 1, 1) if last else nn.MaxPool2d(2, 2, ceil_mode=True))
        fc = {"kernel_size": 3, "padding": dilation, "dilation": dilation}
        start = len(layers)
        layers += _conv(in_channels, conv7_channels, norm, **fc)
        layers += _conv(conv7_channels, conv7_channels, norm, kernel_size=1)
        self.features = nn.Sequential(*layers)
        self.l2norm = L2Norm(channels[3], l2norm_init)

        widths, in_channels = [channels[3], conv7_channels], conv7_channels
        self.extras = nn.ModuleList()
        for squeezed, width, kernel, stride, padding in extras:
            self.extras.append(
                nn.Sequential(
                    *_conv(in_channels, squeezed, norm, kernel_size=1),
                    *_conv(
                        *(squeezed, width, norm), kernel_size=kernel, stride=stride, padding=padding
                    ),
                )
            )
            in_channels = width
            widths.append(width)

        _initialise(self.features[:start], nn.init.kaiming_normal_, mode="fan_out")
        _initialise(self.features[start:], nn.init.xavier_uniform_)
        _initialise(self.extras, nn.init.xavier_uniform_)
        extra_names = [f"conv{i + 8}_2" for i in range(len(extras))]
        self._out_features = ["conv4_3", "conv7", *extra_names]
        self._out_feature_channels = dict(zip(self._out_features, widths))
        self._out_feature_strides = dict(zip(self._out_features, strides))

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return the maps of the images ``x`` (N, C, H, W), finest first."""
        maps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index == self._conv4_3:
                maps.append(self.l2norm(x))
        maps.append(x)
        for level in self.extras:
            x = level(x)
            maps.append(x)
        return dict(zip(self._out_features, maps))

    def map_sizes(self, size: int) -> Tuple[int, ...]:
        """Sides of the maps of a square image.

        Raises:
            ValueError: a map would have no cell.
        """
        sides, side = [], size
        for layer in list(self.features) + [layer for level in self.extras for layer in level]:
            side = _side_after(layer, side)
            if side < 1:
                raise ValueError(
                    f"MODEL.SSD.INPUT_SIZE {size} is too small for MODEL.SSD_VGG.EXTRAS: no cell "
                    f"is left of a map; leave out the last levels or pad them"
                )
            sides.append(side)
        features = len(self.features)
        ends = [features - 1]
        for level in self.extras:
            ends.append(ends[-1] + len(level))
        return tuple(sides[i] for i in (self._conv4_3, *ends))


def _conv(in_channels: int, width: int, norm: str, **kwargs: int) -> List[nn.Module]:
    conv = nn.Conv2d(in_channels, width, bias=not norm, **kwargs)
    return [conv, *([get_norm(norm, width)] if norm else []), nn.ReLU()]


def _initialise(modules: nn.Module, weights, **kwargs) -> None:
    for module in modules.modules():
        if isinstance(module, nn.Conv2d):
            weights(module.weight, **kwargs)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _side_after(layer: nn.Module, side: int) -> int:
    """Side of the output of a conv, a pool, or a layer that keeps it."""
    if not isinstance(layer, (nn.Conv2d, nn.MaxPool2d)):
        return side
    kernel, stride, padding, dilation = (
        value[0] if isinstance(value, tuple) else value
        for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    span = side + 2 * padding - dilation * (kernel - 1) - 1
    return (-(-span // stride) if getattr(layer, "ceil_mode", False) else span // stride) + 1


def _check_lengths(channels, depths, extras, strides) -> None:
    if len(channels) != 5 or len(depths) != 5:
        raise ValueError(
            "MODEL.SSD_VGG.CHANNELS and DEPTHS must have 5 entries, one per block of VGG, got "
            f"{tuple(channels)} and {tuple(depths)}"
        )
    if any(len(level) != 5 for level in extras):
        raise ValueError(
            "MODEL.SSD_VGG.EXTRAS needs per level (width of the 1x1 conv, width, kernel, stride, "
            f"padding), got {[tuple(level) for level in extras]}"
        )
    if len(strides) != 2 + len(extras):
        raise ValueError(
            f"MODEL.SSD_VGG.EXTRAS has {len(extras)} levels, which makes {2 + len(extras)} with "
            f"conv4_3 and conv7, but MODEL.SSD.STRIDES has {len(strides)} entries"
        )


@BACKBONE_REGISTRY.register()
def build_ssd_vgg_backbone(cfg, input_shape: ShapeSpec) -> SSDVGG:
    """Return the backbone that ``MODEL.SSD_VGG`` describes, with the strides of ``MODEL.SSD``.

    Raises:
        ValueError: its lists do not fit each other.
    """
    node = cfg.MODEL.SSD_VGG
    return SSDVGG(
        in_channels=input_shape.channels,
        channels=node.CHANNELS,
        depths=node.DEPTHS,
        conv7_channels=node.CONV7_CHANNELS,
        dilation=node.DILATION,
        extras=node.EXTRAS,
        strides=cfg.MODEL.SSD.STRIDES,
        norm=node.NORM,
        l2norm_init=node.L2NORM_INIT,
    )
