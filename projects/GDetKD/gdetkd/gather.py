"""Rows of all ranks, whose numbers of rows differ."""

from typing import List, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Gathered", "gather_rows"]


class Gathered(NamedTuple):
    """Rows of all ranks.

    Attributes:
        rows: (B, D) in the order of the ranks.
        counts: rows of each rank.
        rank: that of this process.
    """

    rows: Tensor
    counts: List[int]
    rank: int


@torch.no_grad()
def gather_rows(rows: Tensor) -> Gathered:
    """Return the rows of all ranks, the same on each; a collective that every rank must join.

    Tensors stay on their device: Detectron2's ``comm.all_gather`` would pickle them through the
    CPU. Without a process group these are the given rows.

    Args:
        rows: (n, D), n differs between the ranks and may be 0; D and the type do not differ.
    """
    rows = rows.detach()
    if not (dist.is_available() and dist.is_initialized()):
        return Gathered(rows, [len(rows)], 0)
    world_size, rank = dist.get_world_size(), dist.get_rank()
    own = torch.tensor([len(rows)], dtype=torch.int64, device=rows.device)
    numbers = [torch.zeros_like(own) for _ in range(world_size)]
    dist.all_gather(numbers, own)
    counts = torch.cat(numbers).tolist()
    longest = max(counts)
    # the same on all ranks, so that none waits for the others
    if longest == 0:
        return Gathered(rows, counts, rank)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    blocks = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(blocks, padded)
    return Gathered(torch.cat([b[:n] for b, n in zip(blocks, counts)]), counts, rank)
