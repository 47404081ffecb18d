"""Batch norms of a frozen network as part of the convs before them."""

from typing import Optional

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn

__all__ = ["FusedNorm", "fuse_norms"]

# exact types: a subclass may compute something else
_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)


def fuse_norms(model: nn.Module) -> int:
    """Return how many batch norms of ``model`` were multiplied into their convs, in place.

    Only those of Detectron2's ``Conv2d`` wrapper that are frozen or in eval mode with running
    statistics; norms that are modules by themselves, as in the heads, and other kinds are left
    alone. Outputs agree up to rounding; each module, the norm included, still gives what it gave.
    ``model.state_dict()`` keeps its names and, bit by bit, its values; loading into ``model`` is
    no longer possible, and neither is training it.

    Args:
        model: in eval mode, without gradients.
    """
    convs = [m for m in model.modules() if type(m).forward is Conv2d.forward and _fits(m.norm)]
    for conv in convs:
        conv.norm = FusedNorm(conv).eval()
    return len(convs)


def _fits(norm: Optional[nn.Module]) -> bool:
    if type(norm) is FrozenBatchNorm2d:
        return True
    return type(norm) in _NORMS and not norm.training and norm.running_mean is not None


class FusedNorm(nn.Module):
    """The identity, where a norm was that is now part of its conv's weights.

    It keeps what gives the weights of before back exactly: dividing by the scale misses at most
    by a few units in the last place, one byte a weight. Where it does not (a scale of 0, results
    too small for the type), weights themselves are kept.
    """

    def __init__(self, conv: Conv2d):
        """
        Args:
            conv: its weight and bias are changed, its norm is moved here.
        """
        super().__init__()
        self.norm = norm = conv.norm
        dtype = conv.weight.dtype
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        if self.bias is not None:
            shift = shift + self.bias.double() * scale
        self.register_buffer("scale", scale.to(dtype).view(-1, 1, 1, 1))

        before = conv.weight.detach()
        after = before * self.scale
        conv.weight = nn.Parameter(after, requires_grad=False)
        conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)

        # integers that wrap around: what is added to the quotient's is right in any case
        difference = _bits(before) - _bits(after / self.scale)
        self.register_buffer("steps", difference.clamp(-128, 127).to(torch.int8))
        missed = (self.steps != difference).flatten().nonzero().squeeze(1)
        self.register_buffer("missed", missed)
        self.register_buffer("missed_values", before.flatten()[missed])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def original_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the conv's weight of before from its present one."""
        result = (_bits(weight / self.scale) + self.steps).view(weight.dtype).contiguous()
        result.view(-1)[self.missed] = self.missed_values
        return result

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """That of the norm; the parent's entries in ``destination`` become those of before."""
        result = self.norm.state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        parent = prefix[: -len("norm.")]
        if destination is not None and parent + "weight" in destination:
            destination[parent + "weight"] = self.original_weight(
                destination[parent + "weight"].detach()
            )
            destination.pop(parent + "bias")
            if self.bias is not None:
                destination[parent + "bias"] = self.bias
        return result

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        raise RuntimeError(
            f"cannot load '{prefix}*': this norm is part of its conv's weights "
            "(KD.TEACHER.FUSE_BN); load before the teacher is made"
        )


def _bits(x: torch.Tensor) -> torch.Tensor:
    """``x``, contiguous or not, as integers whose differences count representable numbers."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
