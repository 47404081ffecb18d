"""Regions that the ground-truth boxes alone determine."""

from typing import Sequence, Tuple

import torch
from detectron2.structures import Boxes
from torch import Tensor

from ..pair import Grid
from ..registry import KD_REGIONS
from .base import AnchorRegion, CellRegion

__all__ = [
    "BoxRegion",
    "GTCells",
    "GTCentre",
    "Gaussian",
    "ScaledBackground",
    "ScaledGT",
    "fpn_level",
]


def fpn_level(boxes: Tensor, num_levels: int) -> Tensor:
    """Index of the pyramid level that a box belongs to by its size, as in DeFeat's official code.

    floor(log2(sqrt((w + 1)(h + 1)) / 56 + 1e-6)), clamped: sides of 111, 222 and 223 pixels give
    1, 1 and 2.

    Args:
        boxes: (G, 4) XYXY, pixels.
        num_levels: of the pyramid.

    Returns:
        int64 (G,) in 0..num_levels-1.
    """
    sides = (boxes[:, 2:] - boxes[:, :2] + 1).clamp(min=0)
    levels = torch.log2(sides.prod(dim=1).sqrt() / 56 + 1e-6).floor()
    return levels.clamp(0, num_levels - 1).long()


@KD_REGIONS.register()
class GTCentre(AnchorRegion):
    """1 where the anchor's centre is inside any ground-truth box, its border excluded.

    Every level uses every box ("Inside-GT" of LD's table, as in its official code).
    """

    def anchors(self, ctx):
        centres = Boxes.cat(ctx.student["anchors"]).get_centers()
        return torch.stack([_inside_any(centres, gt.gt_boxes.tensor) for gt in ctx.gt_instances])


def _inside_any(centres: Tensor, boxes: Tensor) -> Tensor:
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    inside = ((centres > low) & (centres < high)).all(dim=2)  # (G, R)
    return inside.any(dim=0).float()


class BoxRegion(CellRegion):
    """Base of regions in which a box weights cells by its row times its column; the largest counts.

    Subclasses say what a box makes of the rows and the columns of a level.
    """

    def __init__(self, levels: str = "all"):
        """
        Args:
            levels: "all": a box counts on every level that is compared; "fpn": only on the one of
                them that :func:`fpn_level` gives it.

        Raises:
            ValueError: another value.
        """
        if levels not in ("all", "fpn"):
            raise ValueError(
                f'{type(self).__name__}: levels must be "all" or "fpn", got {levels!r}'
            )
        self._levels = levels

    def sides(
        self, boxes: Tensor, grid: Grid, image_size: Tuple[int, int]
    ) -> Tuple[Tensor, Tensor]:
        """Return the factors (G, H) of the rows and (G, W) of the columns, G > 0.

        Args:
            boxes: (G, 4) XYXY, absolute pixels.
            grid: the level.
            image_size: (h, w) before padding.
        """
        raise NotImplementedError

    def own_level(self, boxes: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return (G,) the index in ``grids`` of the one level that a box counts on with "fpn"."""
        return fpn_level(boxes, len(grids))

    def cells(self, ctx, grids):
        images = [
            self._image(gt.gt_boxes.tensor.float(), size, grids)
            for gt, size in zip(ctx.gt_instances, ctx.image_sizes)
        ]
        return [torch.stack(level) for level in zip(*images)]

    def _image(self, boxes: Tensor, size, grids: Sequence[Grid]):
        if not len(boxes):
            return [boxes.new_zeros(grid.height, grid.width) for grid in grids]
        own = self.own_level(boxes, grids)
        levels = []
        for index, grid in enumerate(grids):
            rows, columns = self.sides(boxes, grid, size)
            if self._levels == "fpn":
                rows = rows * (own == index)[:, None]
            levels.append((rows[:, :, None] * columns[:, None, :]).amax(dim=0))
        return levels


def _cell_range(boxes: Tensor, grid: Grid) -> Tuple[Tensor, Tensor, Tensor]:
    """Boxes truncated to cells: (first cells (G, 2), numbers of cells (G, 2), empty (G, 1)).

    x comes before y. A box without a whole cell is empty, which stands for the cell of its upper
    left corner, also when it has extent in the other direction; outside of the map it is the
    nearest cell.
    """
    limits = boxes.new_tensor([grid.width, grid.height])
    low, high = (boxes / grid.stride).trunc().split(2, dim=1)
    low = low.clamp(min=0).minimum(limits - 1)
    count = high.minimum(limits) - low
    empty = (count <= 0).any(dim=1, keepdim=True)
    return low, torch.where(empty, 1.0, count), empty


@KD_REGIONS.register()
class GTCells(BoxRegion):
    """1 on the cells that a ground-truth box covers, its corners divided by the stride and
    truncated; the lower right cell is excluded (DeFeat's official code).

    Reading ``levels`` as in :class:`BoxRegion`. DeFeat uses "fpn" and for the background
    ``Complement(GTCells("fpn"))``.
    """

    def sides(self, boxes, grid, image_size):
        low, count, _ = _cell_range(boxes, grid)
        rows = _offsets(low[:, 1], grid.height)
        columns = _offsets(low[:, 0], grid.width)
        return _within(rows, count[:, 1]), _within(columns, count[:, 0])


def _offsets(first: Tensor, length: int) -> Tensor:
    """(G, length): number of each cell counted from the box's first one."""
    return torch.arange(length, device=first.device) - first[:, None]


def _within(offsets: Tensor, count: Tensor) -> Tensor:
    return ((offsets >= 0) & (offsets < count[:, None])).float()


@KD_REGIONS.register()
class Gaussian(BoxRegion):
    """A bell in every ground-truth box of :class:`GTCells`: exp(-((x - w/2) / (w/2))^2 / 2), times
    the same in y, for cells x = 0..w-1 of a box of w cells. Where boxes overlap the largest counts.

    Of TADF, whose own code was not available (unverified): this follows the port in DeFeat's
    repository except for the strides, which are fixed to 4-64 there. The maximum is at w/2, half
    a cell off the middle. The paper (unverified) divides by twice the sum of the weights,
    ``Weights(2.0)``; ``Elements`` counts the cells instead. A box of less than a cell is one cell
    of weight 1.
    """

    def __init__(self, levels: str = "all", center_cell: bool = False):
        """
        Args:
            levels: see :class:`BoxRegion`.
            center_cell: evaluate at x + 1/2, so that the bell is symmetric (ours).
        """
        super().__init__(levels)
        self._shift = 0.5 if center_cell else 0.0

    def sides(self, boxes, grid, image_size):
        low, count, empty = _cell_range(boxes, grid)
        return tuple(
            self._bell(_offsets(low[:, axis], length), count[:, axis], empty)
            for axis, length in ((1, grid.height), (0, grid.width))
        )

    def _bell(self, offsets: Tensor, count: Tensor, empty: Tensor) -> Tensor:
        half = count[:, None] / 2
        bell = torch.exp(-((offsets + self._shift - half) / half).square() / 2)
        return torch.where(empty, 1.0, bell) * _within(offsets, count)


@KD_REGIONS.register()
class ScaledGT(BoxRegion):
    """Foreground of FGD: in every ground-truth box 1 / (number of its cells); all levels.

    A box covers the rows floor(y1)..ceil(y2) inclusive, in cells, and columns likewise; its number
    of cells includes those beyond the border of the map. Where boxes overlap, the smaller counts.
    """

    def __init__(self, scale: str = "stride"):
        """
        Args:
            scale: pixels to cells: "stride" divides by the stride. "image" is FGD's official
                code, which multiplies by (cells of the padded map / pixels of the unpadded
                image), so that boxes grow where the batch is padded.

        Raises:
            ValueError: another value.
        """
        super().__init__("all")
        if scale not in ("stride", "image"):
            raise ValueError(
                f'{type(self).__name__}: scale must be "stride" or "image", got {scale!r}'
            )
        self._scale = scale

    def sides(self, boxes, grid, image_size):
        factors = [1 / grid.stride] * 2
        if self._scale == "image":
            factors = [grid.width / image_size[1], grid.height / image_size[0]]
        boxes = boxes * boxes.new_tensor(factors * 2)
        low, high = boxes[:, :2].floor(), boxes[:, 2:].ceil()
        count = high - low + 1
        rows = _within(_offsets(low[:, 1], grid.height), count[:, 1])
        columns = _within(_offsets(low[:, 0], grid.width), count[:, 0])
        return rows / count[:, 1:], columns / count[:, :1]


@KD_REGIONS.register()
class ScaledBackground(CellRegion):
    """Background of FGD: 1 / (number of such cells) where :class:`ScaledGT` is 0, per image and
    level; 0 where no cell is background."""

    def __init__(self, scale: str = "stride"):
        """``scale``: of :class:`ScaledGT`."""
        self._foreground = ScaledGT(scale)

    def cells(self, ctx, grids):
        levels = []
        for foreground in self._foreground.cells(ctx, grids):
            background = (foreground == 0).float()
            levels.append(background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1))
        return levels
