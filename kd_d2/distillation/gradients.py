"""Norms and directions of the gradients of single losses."""

import math
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch

__all__ = ["Gradient", "compare_gradients", "gradient_norms"]

Inputs = Mapping[str, Sequence[torch.Tensor]]


class Gradient(NamedTuple):
    """Of one loss with respect to one group of tensors.

    Attributes:
        norm: L2 norm over the group; NaN or infinite where the gradient is.
        cosine: with the gradient of the reference; NaN where one of both is 0 or not finite.
    """

    norm: float
    cosine: float


def gradient_norms(losses: Mapping[str, torch.Tensor], inputs: Inputs) -> Dict[str, Dict]:
    """Return, per loss and per group of tensors, the L2 norm of the gradient over the group.

    One backward pass a loss, for all groups together. The graph is kept, and neither ``.grad`` of
    a parameter nor a hook of DDP is touched.

    Args:
        losses: name -> scalar. One without a graph has the norm 0.
        inputs: group -> tensors that require a gradient: activations or parameters. For
            activations of which one is made from another (p7 from p6) these are total
            derivatives: what reaches p7 counts for p6, too.

    Returns:
        loss -> group -> norm; NaN or infinite where the gradient is.
    """
    return {
        name: {group: _norm(parts) for group, parts in _groups(loss, inputs)}
        for name, loss in losses.items()
    }


def compare_gradients(
    losses: Mapping[str, torch.Tensor], inputs: Inputs, reference: str
) -> Dict[str, Dict[str, Gradient]]:
    """Return what :func:`gradient_norms` does, and the cosine with the gradient of a loss.

    A negative cosine says that a small step against the one gradient raises the other loss.

    Args:
        losses, inputs: as of :func:`gradient_norms`; the reference's gradients are kept meanwhile.
        reference: name of the loss whose direction the others are compared with.
    """
    theirs = dict(_groups(losses[reference], inputs))
    lengths = {group: _norm(parts) for group, parts in theirs.items()}
    result = {}
    for name, loss in losses.items():
        result[name] = {}
        for group, parts in theirs.items() if name == reference else _groups(loss, inputs):
            norm = _norm(parts)
            product = _dot(parts, theirs[group])
            scale = norm * lengths[group]
            cosine = product / scale if 0 < scale < math.inf else math.nan
            result[name][group] = Gradient(norm, cosine)
    return result


Gradients = List[Optional[torch.Tensor]]


def _groups(loss: torch.Tensor, inputs: Inputs) -> Iterator[Tuple[str, Gradients]]:
    """Groups and the gradients of their tensors, None where a tensor has no part in the loss."""
    tensors = [tensor for group in inputs.values() for tensor in group]
    grads: Gradients = [None] * len(tensors)
    if tensors and getattr(loss, "requires_grad", False):
        grads = list(torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True))
    for group, members in inputs.items():
        yield group, grads[: len(members)]
        grads = grads[len(members) :]


def _norm(grads: Gradients) -> float:
    norms = [g.float().norm() for g in grads if g is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _dot(left: Gradients, right: Gradients) -> float:
    pairs = [(a, b) for a, b in zip(left, right) if a is not None and b is not None]
    if not pairs:
        return 0.0
    return float(torch.stack([(a.float() * b.float()).sum() for a, b in pairs]).sum())
