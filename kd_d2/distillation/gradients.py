"""How strongly each loss pulls at the student."""

from typing import Dict, Mapping, Sequence

import torch

__all__ = ["gradient_norms"]


def gradient_norms(
    losses: Mapping[str, torch.Tensor], inputs: Mapping[str, Sequence[torch.Tensor]]
) -> Dict[str, Dict[str, float]]:
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
    tensors = [tensor for group in inputs.values() for tensor in group]
    result = {}
    for name, loss in losses.items():
        grads = [None] * len(tensors)
        if tensors and getattr(loss, "requires_grad", False):
            grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        result[name], rest = {}, list(grads)
        for group, members in inputs.items():
            own, rest = rest[: len(members)], rest[len(members) :]
            norms = [g.float().norm() for g in own if g is not None]
            result[name][group] = float(torch.stack(norms).norm()) if norms else 0.0
    return result
