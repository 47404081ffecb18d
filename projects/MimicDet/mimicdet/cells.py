"""Flat numbers of cells.

There is one anchor per cell, so that number of an anchor and number of a cell are the same:
``offset of the level + y * width + x``, levels finest first. This is the order of Detectron2's
``DefaultAnchorGenerator``.
"""

from itertools import accumulate
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

__all__ = ["cell_levels", "cell_positions", "gather_cells", "grid_sizes", "level_offsets"]

Grid = Tuple[int, int]
"""Height and width of a level in cells."""


def grid_sizes(maps: Sequence[Tensor]) -> List[Grid]:
    """Return (H, W) of each of the (N, C, H, W) ``maps``."""
    return [(x.shape[-2], x.shape[-1]) for x in maps]


def level_offsets(grids: Sequence[Grid]) -> List[int]:
    """Return the number of the first cell of each level and, last, the number of all cells.

    Args:
        grids: (H, W) of L levels.

    Returns:
        L + 1 numbers.
    """
    return [0, *accumulate(height * width for height, width in grids)]


def cell_levels(anchor_index: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Return the level of each cell, (R,) int64 from 0 for the finest.

    Args:
        anchor_index: (R,) int64, flat numbers.
        grids: (H, W) per level.
    """
    ends = torch.as_tensor(level_offsets(grids)[1:], device=anchor_index.device)
    return torch.searchsorted(ends, anchor_index, right=True)


def cell_positions(anchor_index: Tensor, grids: Sequence[Grid]) -> Tuple[Tensor, Tensor, Tensor]:
    """Return (level, y, x) of each cell, (R,) int64 each; arguments as :func:`cell_levels`."""
    level = cell_levels(anchor_index, grids)
    starts = torch.as_tensor(level_offsets(grids), device=anchor_index.device)
    widths = torch.as_tensor([width for _, width in grids], device=anchor_index.device)
    inside, width = anchor_index - starts[level], widths[level]
    return level, inside // width, inside % width


def gather_cells(maps: List[Tensor], anchor_index: List[Tensor]) -> Tensor:
    """Return the vectors of the given cells, (R, C), those of all images in order.

    Args:
        maps: (N, C, H, W) per level.
        anchor_index: flat numbers of cells, (R_n,) int64 for each of the N images.
    """
    rows = torch.cat([x.flatten(2) for x in maps], dim=2)
    image = torch.cat([torch.full_like(x, i) for i, x in enumerate(anchor_index)])
    return rows[image, :, torch.cat(anchor_index)]
