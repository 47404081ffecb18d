"""Averages over processes."""

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["reduce_mean"]


@torch.no_grad()
def reduce_mean(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over all processes, without gradient.

    A collective operation: every rank has to call it at every step with the same shape, hence
    never under a condition that depends on the rank's own data.

    Args:
        tensor: any shape, floating point. Not modified.

    Returns:
        Tensor of the same shape, equal on all ranks; the detached input when
        ``torch.distributed`` is not initialised or there is one process.
    """
    tensor = tensor.detach()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total / dist.get_world_size()
