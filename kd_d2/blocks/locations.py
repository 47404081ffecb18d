"""Dense predictions by anchor, and features at the cells of anchors."""

from typing import List

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K

__all__ = ["anchor_rows", "at_anchors", "rows_of_anchors"]


def anchor_rows(levels: List[torch.Tensor], width: int) -> torch.Tensor:
    """Per-level (N, A*width, H, W) -> (N, R, width) in the order of the anchors: fp32, no graph."""
    return torch.cat([permute_to_N_HWA_K(x.detach().float(), width) for x in levels], dim=1)


def at_anchors(
    levels: List[torch.Tensor], anchors_per_cell: int, images: torch.Tensor, anchors: torch.Tensor
) -> torch.Tensor:
    """Return the feature of the cell of each of M anchors, with its graph.

    Args:
        levels: (N, C, H, W), fine to coarse.
        anchors_per_cell: the same on all levels.
        images: (M,) index of the image.
        anchors: (M,) number of the anchor among those of all levels, cell by cell.

    Returns:
        (M, C).
    """
    cells = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)
    return cells[images, anchors // anchors_per_cell]


def rows_of_anchors(
    levels: List[torch.Tensor], width: int, images: torch.Tensor, anchors: torch.Tensor
) -> torch.Tensor:
    """Return the prediction of each of M anchors, with its graph.

    Args:
        levels: (N, A*width, H, W), fine to coarse.
        width: numbers an anchor.
        images, anchors: (M,) as for :func:`at_anchors`.

    Returns:
        (M, width).
    """
    rows = torch.cat([permute_to_N_HWA_K(x, width) for x in levels], dim=1)
    return rows[images, anchors]
