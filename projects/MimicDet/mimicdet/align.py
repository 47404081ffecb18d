"""Alignment layers of the S-head: which cells the feature of an adjusted box is computed from."""

import torch
from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from kd_d2.losses.precision import full_precision

from .box_init import init_micro_network
from .offsets import box_offsets
from .options import choice

__all__ = [
    "ALIGN_REGISTRY",
    "AlignLayer",
    "ConvAlign",
    "DeformAlign",
    "GuidedAlign",
    "ROIConvAlign",
    "build_align",
    "init_gaussian",
    "init_he",
    "init_xavier",
    "register_align",
]

ALIGN_REGISTRY = Registry("ALIGN")
ALIGN_REGISTRY.__doc__ = """
Values of ``MODEL.MIMICDET.S_HEAD.ALIGN``: an :class:`AlignLayer` each, which is called with
``(cfg, channels=..., kernel_size=...)``.
"""


def build_align(cfg, channels: int, kernel_size: int) -> "AlignLayer":
    """Build the layer ``MODEL.MIMICDET.S_HEAD.ALIGN``.

    Raises:
        ValueError: there is no such layer, or the kernel is even.
    """
    layer = choice("S_HEAD.ALIGN", cfg.MODEL.MIMICDET.S_HEAD.ALIGN, dict(ALIGN_REGISTRY))
    return layer(cfg, channels=channels, kernel_size=kernel_size)


def register_align(name: str):
    """Decorator: the class below is ``name`` in configs, instead of the name of the class."""

    def register(cls: type) -> type:
        ALIGN_REGISTRY._do_register(name, cls)
        return cls

    return register


class AlignLayer(nn.Module):
    """A k x k convolution whose taps move by :meth:`offsets`, computed in fp32.

    Its parameters are those of ``nn.Conv2d``: one group, stride 1, no modulation mask. Weights
    are drawn from N(0, 0.01), biases are 0 (the paper).
    """

    # whether the offsets have parameters of their own
    learns_offsets = False
    # the operator; an exporter sets one that its runtime has
    deform_conv = staticmethod(deform_conv2d)

    @configurable
    def __init__(self, *, channels: int, kernel_size: int):
        """
        Args:
            channels: of input and output.
            kernel_size: k, odd.

        Raises:
            ValueError: ``kernel_size`` is even or not positive.
        """
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                "MODEL.MIMICDET.S_HEAD.KERNELS must be odd and positive, so that a cell is the "
                f"kernel's centre, got {kernel_size}"
            )
        self.kernel_size = kernel_size
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)
        init_gaussian(self.conv)

    @classmethod
    def from_config(cls, cfg, channels, kernel_size):
        return {"channels": channels, "kernel_size": kernel_size}

    def offsets(self, features: Tensor, deltas: Tensor) -> Tensor:
        """Offsets of the taps in cells, laid out as in :mod:`.offsets`.

        Args:
            features: (N, C, H, W), pyramid level.
            deltas: (N, 4, H, W), (dx, dy, dw, dh) of the refinement module, weights 1.

        Returns:
            (N, 2k^2, H, W).
        """
        raise NotImplementedError

    def forward(self, features: Tensor, deltas: Tensor) -> Tensor:
        """Return the convolved map, (N, C, H, W), without activation; arguments as above."""
        # the operator has no half precision on the CPU, and half a cell is not much
        with torch.autocast(features.device.type, enabled=False):
            features, deltas = full_precision(features), full_precision(deltas)
            return self._convolve(features, deltas)

    def _convolve(self, features: Tensor, deltas: Tensor) -> Tensor:
        offsets = self.offsets(features, deltas)
        conv = self.conv
        return self.deform_conv(features, offsets, conv.weight, conv.bias, padding=conv.padding)


@register_align("conv")
class ConvAlign(AlignLayer):
    """A plain convolution: Table 2 (a)."""

    def offsets(self, features, deltas):
        num_images, _, height, width = features.shape
        return features.new_zeros(num_images, 2 * self.kernel_size**2, height, width)

    def _convolve(self, features, deltas):
        return self.conv(features)


@register_align("deform")
class DeformAlign(AlignLayer):
    """Offsets from the features, which do not know the adjusted boxes: Table 2 (b).

    They come from a 3 x 3 convolution that starts at zero. Ours, as in Detectron2's deformable
    blocks: the paper does not say.
    """

    learns_offsets = True

    @configurable
    def __init__(self, *, channels: int, kernel_size: int):
        super().__init__(channels=channels, kernel_size=kernel_size)
        self.offset_conv = nn.Conv2d(channels, 2 * kernel_size**2, 3, padding=1)
        init_gaussian(self.offset_conv, std=0.0)

    def offsets(self, features, deltas):
        return self.offset_conv(features)


@register_align("guided")
class GuidedAlign(AlignLayer):
    """Offsets from the refinement's deltas by a micro-network, 4 -> 64 -> 128 -> 2k^2: (c), (d).

    Equal deltas mean equal offsets in cells on all levels, because anchors are four cells wide
    everywhere; hence levels can share the layer.
    """

    learns_offsets = True

    @configurable
    def __init__(
        self,
        *,
        channels: int,
        kernel_size: int,
        offset_std: float = 0.01,
        offset_init: str = "gaussian",
        offset_lr_factor: float = 1.0,
        anchor_scale: float = 4.0,
    ):
        """
        Args:
            channels, kernel_size: see :class:`AlignLayer`.
            offset_std: standard deviation of the micro-network's initial weights. With the paper's
                0.01 initial offsets are of the order of 3e-5 cells, with 0.1 of 0.02.
            offset_init: "gaussian" (paper), or "box": the network starts as the function that
                ``ROIConvAlign`` computes, see :func:`init_micro_network`.
            offset_lr_factor: of the gradient at the offsets, hence of the micro-network's learning
                rate.
            anchor_scale: side of the anchors in cells; for "box" only.

        Raises:
            ValueError: ``offset_init`` is unknown, or the factor negative.
        """
        if offset_lr_factor < 0:
            raise ValueError(
                "MODEL.MIMICDET.S_HEAD.OFFSET_LR_FACTOR must not be negative, got "
                f"{offset_lr_factor}"
            )
        super().__init__(channels=channels, kernel_size=kernel_size)
        self.micro_network = nn.Sequential(
            nn.Conv2d(4, 64, 1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 1),
            nn.ReLU(),
            nn.Conv2d(128, 2 * kernel_size**2, 1),
        )
        for layer in self.micro_network[::2]:
            init_gaussian(layer, std=offset_std)
        if choice("S_HEAD.OFFSET_INIT", offset_init, {"gaussian": False, "box": True}):
            init_micro_network(*self.micro_network[::2], kernel_size, anchor_scale)
        self.offset_lr_factor = offset_lr_factor

    @classmethod
    def from_config(cls, cfg, channels, kernel_size):
        node = cfg.MODEL.MIMICDET
        return {
            **super().from_config(cfg, channels, kernel_size),
            "offset_std": node.S_HEAD.OFFSET_INIT_STD,
            "offset_init": node.S_HEAD.OFFSET_INIT,
            "offset_lr_factor": node.S_HEAD.OFFSET_LR_FACTOR,
            "anchor_scale": node.REFINE.BASE_SCALE,
        }

    def offsets(self, features, deltas):
        offsets = self.micro_network(deltas)
        if offsets.requires_grad and self.offset_lr_factor != 1:
            offsets.register_hook(lambda gradient: gradient * self.offset_lr_factor)
        return offsets


@register_align("roiconv")
class ROIConvAlign(AlignLayer):
    """Taps spread evenly over the adjusted box, nothing to learn; a reference of ours."""

    @configurable
    def __init__(self, *, channels: int, kernel_size: int, anchor_scale: float = 4.0):
        """
        Args:
            channels, kernel_size: see :class:`AlignLayer`.
            anchor_scale: side of the anchors in cells.
        """
        super().__init__(channels=channels, kernel_size=kernel_size)
        self.anchor_scale = anchor_scale

    @classmethod
    def from_config(cls, cfg, channels, kernel_size):
        return {
            **super().from_config(cfg, channels, kernel_size),
            "anchor_scale": cfg.MODEL.MIMICDET.REFINE.BASE_SCALE,
        }

    def offsets(self, features, deltas):
        return box_offsets(deltas, self.kernel_size, self.anchor_scale)


def init_gaussian(layer: nn.Module, std: float = 0.01) -> None:
    """Draw ``layer.weight`` from N(0, std) and set ``layer.bias`` to 0."""
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)


def init_he(layer: nn.Module) -> None:
    """Draw ``layer.weight`` from N(0, sqrt(2 / fan_in)) and set ``layer.bias`` to 0.

    A ReLU after the layer then leaves the scale of its input, whatever the width.
    """
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)


def init_xavier(layer: nn.Module) -> None:
    """Draw ``layer.weight`` from U with variance 1 / fan_in and set ``layer.bias`` to 0.

    As the T-head's fully connected layers (``c2_xavier_fill``).
    """
    nn.init.kaiming_uniform_(layer.weight, a=1)
    nn.init.zeros_(layer.bias)
