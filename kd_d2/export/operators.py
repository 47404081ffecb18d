"""The operators that runtimes do not share, as PyTorch has them and as ONNX has them."""

from typing import Callable, NamedTuple

from torch import Tensor
from torchvision.ops import deform_conv2d

from .deform_conv import sampled_deform_conv2d
from .suppression import Suppress, suppress, suppress_onnx

__all__ = ["ONNX", "PYTORCH", "Operators"]


class Operators(NamedTuple):
    """What a graph is built with."""

    suppress: Suppress
    """Non-maximum suppression over a batch, see :mod:`.suppression`."""
    deform_conv: Callable[..., Tensor]
    """With the arguments of :func:`torchvision.ops.deform_conv2d`."""


PYTORCH = Operators(suppress, deform_conv2d)
ONNX = Operators(suppress_onnx, sampled_deform_conv2d)
