"""Layers that run with the leading part of their channels: the weights of narrower ones are a
prefix of those of wider ones.

The number of active output channels is an attribute that is set anew before every step, never part
of a checkpoint; a fresh layer is as wide as its weights.
"""

import torch
from detectron2.layers import Conv2d
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import Tensor, nn
from torch.nn import functional as F

from kd_d2.losses.precision import full_precision

__all__ = ["ElasticBatchNorm2d", "ElasticConv2d", "ElasticLinear", "make_convs_elastic"]


class ElasticConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with the leading outputs and as many inputs as it is given.

    Attributes:
        active_out: outputs that are computed.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.active_out = self.out_channels

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "ElasticConv2d":
        """Return an elastic conv that has the parameters, norm and activation of ``conv``."""
        assert conv.groups == 1
        with torch.device("meta"):  # no memory, no random numbers
            result = cls(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                bias=conv.bias is not None,
            )
        result.weight, result.bias = conv.weight, conv.bias
        result.norm = getattr(conv, "norm", None)
        result.activation = getattr(conv, "activation", None)
        return result

    def forward(self, x: Tensor) -> Tensor:
        out = self.active_out
        weight = self.weight[:out, : x.shape[1]]
        bias = None if self.bias is None else self.bias[:out]
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class ElasticLinear(nn.Linear):
    """A linear layer that reads the leading inputs, as many as it is given."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "ElasticLinear":
        """Return an elastic layer that has the parameters of ``linear``."""
        with torch.device("meta"):
            result = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        result.weight, result.bias = linear.weight, linear.bias
        return result

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, : x.shape[1]], self.bias)


class ElasticBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of the leading channels.

    Running statistics mix the subnets that were trained, and fit none of them: recalibrate.
    ``num_batches_tracked`` is not counted; nothing reads it with a fixed momentum.
    """

    def __init__(self, num_features: int, *, synchronised: bool):
        """
        Args:
            num_features: channels of the widest layer.
            synchronised: in training, statistics of the batches of all processes together, each
                pixel with the same weight. ``nn.SyncBatchNorm`` cannot run on slices.
        """
        super().__init__(num_features)
        self.synchronised = synchronised

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.synchronised and comm.get_world_size() > 1:
            return self._over_all_processes(x)
        n = x.shape[1]
        return F.batch_norm(
            x,
            self.running_mean[:n],
            self.running_var[:n],
            self.weight[:n],
            self.bias[:n],
            self.training,
            self.momentum,
            self.eps,
        )

    def _over_all_processes(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            values = full_precision(x)
            n = x.shape[1]
            count = values.new_full((1,), values.numel() / n)
            sums = [values.sum(dim=(0, 2, 3)), (values * values).sum(dim=(0, 2, 3)), count]
            total, squares, count = differentiable_all_reduce(torch.cat(sums)).split([n, n, 1])
            mean = total / count
            variance = (squares / count - mean * mean).clamp(min=0)
            self._track(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
            scale = self.weight[:n] * (variance + self.eps).rsqrt()
            shift = self.bias[:n] - mean * scale
            return (values * scale.view(1, n, 1, 1) + shift.view(1, n, 1, 1)).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        n = len(mean)
        self.running_mean[:n].lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var[:n].lerp_(variance.detach().to(self.running_var.dtype), self.momentum)


def make_convs_elastic(module: nn.Module) -> None:
    """Replace the convs among the children of ``module`` by elastic ones; parameters stay."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            setattr(module, name, ElasticConv2d.of(child))
