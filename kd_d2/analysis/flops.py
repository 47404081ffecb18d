"""Multiply-adds of a forward pass, as fvcore counts them."""

from typing import Any, Dict, List

from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import nn

__all__ = ["flop_analysis", "flops_by_module"]


def flop_analysis(model: nn.Module, inputs: Any) -> FlopCountAnalysis:
    """Return fvcore's analysis of one forward pass; ``.total()`` is what is called FLOPs.

    One multiply-add counts 1. Counted are convolutions (with output positions * C_in * C_out * k^2
    for deformable ones, which fvcore does not know), linear maps, matrix products, and norms and
    interpolation by number of elements. Pointwise operations, RoIAlign and NMS count nothing.

    Args:
        model: in eval mode.
        inputs: its only argument, or a tuple of arguments.
    """
    analysis = FlopCountAnalysis(model, inputs)
    analysis.set_op_handle("torchvision::deform_conv2d", _deform_conv_flops)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analysis.tracer_warnings("none")


def flops_by_module(analysis: FlopCountAnalysis) -> Dict[str, float]:
    """Multiply-adds by the path of a module in the model, "" for all of it."""
    # the model itself is an attribute of an adapter for tracing
    prefix = "model"
    return {
        path[len(prefix) :].lstrip("."): count
        for path, count in analysis.by_module().items()
        if path == prefix or path.startswith(f"{prefix}.")
    }


def _deform_conv_flops(inputs: List[Any], outputs: List[Any]) -> int:
    images, _, height, width = get_shape(outputs[0])
    out_channels, in_channels, *kernel = get_shape(inputs[1])
    return images * height * width * out_channels * in_channels * kernel[0] * kernel[1]
