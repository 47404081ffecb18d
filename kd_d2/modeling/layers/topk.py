"""The best values of a row, all of them where there are fewer than asked for."""

from typing import Tuple

from torch import Tensor

__all__ = ["bounded_topk"]


def bounded_topk(values: Tensor, limit: int) -> Tuple[Tensor, Tensor]:
    """The largest values of each row and their positions, best first.

    Unlike ``values.topk(min(limit, n))`` it keeps the bound when it is traced, so that the graph
    takes rows of another length n.

    Args:
        values: (..., n).
        limit: most values per row.

    Returns:
        values and int64 positions, (..., min(limit, n)) each.
    """
    size = values.shape[-1]
    # A tensor in tracing.
    count = size.clamp(max=limit) if isinstance(size, Tensor) else min(size, limit)
    return values.topk(count, dim=-1)
