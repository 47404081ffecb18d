"""Offsets of deformable convolutions: the analytic ones of a box, and their statistics.

An offset map is (N, 2k^2, H, W) in cells of its level: channel 2t is dy and 2t + 1 is dx of tap
t = row * k + column. The tap reads (y + row - (k-1)/2 + dy, x + column - (k-1)/2 + dx), zero
outside of the map.
"""

import math
from typing import Dict, Sequence

import torch
from torch import Tensor

__all__ = ["box_offsets", "offset_statistics"]

# Detectron2's Box2BoxTransform decodes no larger log-size
_MAX_LOG_SIZE = math.log(1000.0 / 16)


def box_offsets(deltas: Tensor, kernel_size: int, scale: float = 4.0) -> Tensor:
    """Offsets that spread the taps over the adjusted box, at the centres of its k x k parts.

    With them the taps read what ``roi_align(kernel_size, sampling_ratio=1, aligned=True)`` reads
    of the unclipped box, as long as all of them lie inside of the map.

    Args:
        deltas: (N, 4, H, W), (dx, dy, dw, dh) relative to the square anchor, weights 1.
        kernel_size: k.
        scale: side of the anchors in cells, 4 on every level of the paper.

    Returns:
        (N, 2k^2, H, W).
    """
    taps = torch.arange(kernel_size, dtype=deltas.dtype, device=deltas.device)
    part = ((taps + 0.5) / kernel_size - 0.5).view(-1, 1, 1)
    grid = (taps - (kernel_size - 1) / 2).view(-1, 1, 1)
    shift = scale * deltas[:, :2]
    size = scale * deltas[:, 2:].clamp(max=_MAX_LOG_SIZE).exp()
    # (N, k, H, W) each
    dx, dy = (shift[:, i, None] + part * size[:, i, None] - grid for i in (0, 1))
    rows = dy[:, :, None].expand(-1, -1, kernel_size, -1, -1)
    columns = dx[:, None].expand(-1, kernel_size, -1, -1, -1)
    return torch.stack((rows, columns), dim=3).flatten(1, 3)


@torch.no_grad()
def offset_statistics(offsets: Sequence[Tensor]) -> Dict[str, Tensor]:
    """How large offsets are, and how much they differ from cell to cell.

    A layer whose last bias alone was learnt has a large ``rms`` and a ``spatial_std`` of 0: its
    taps have moved, but no box guides them.

    Args:
        offsets: (N, 2k^2, H, W) per level, in cells.

    Returns:
        - ``rms``: root of the mean square of all offsets;
        - ``spatial_std``: root of the mean square of their deviations from the mean of their own
          map (image, level, channel). Both weigh every offset of every cell alike; 0 for none.
    """
    offsets = [x.float() for x in offsets]
    count = max(sum(x.numel() for x in offsets), 1)

    def root_mean_square(maps: Sequence[Tensor]) -> Tensor:
        return (torch.stack([x.square().sum() for x in maps]).sum() / count).sqrt()

    return {
        "rms": root_mean_square(offsets),
        "spatial_std": root_mean_square([x - x.mean(dim=(2, 3), keepdim=True) for x in offsets]),
    }
