"""Interface of regions, and those that are made of others."""

from typing import List, Optional, Sequence, Tuple

import torch

from kd_d2.distillation import Assignment

from ..pair import Block, Grid, Pair
from ..registry import KD_REGIONS

__all__ = [
    "All",
    "AnchorRegion",
    "Assigned",
    "CellRegion",
    "Complement",
    "Product",
    "Region",
    "Valid",
    "anchor_levels",
    "anchor_strides",
    "assignment_of",
    "at_strides",
    "strides_of_anchors",
]


class Region(Block):
    """Weight of every position of a pair; a constant of the step, without gradient.

    Attributes:
        strides: of the levels on which the region is defined, final after ``bind``; None: any.
    """

    strides: Optional[Tuple[int, ...]] = None

    def __call__(self, ctx, pair: Pair) -> torch.Tensor:
        """Return fp32 weights >= 0 of the shape ``pair.positions`` (or a prefix of it)."""
        raise NotImplementedError


class CellRegion(Region):
    """A region that is defined on the cells of the pyramid, the same for all anchors of a cell."""

    def cells(self, ctx, grids: Sequence[Grid]) -> List[torch.Tensor]:
        """Return the weights (N, H, W) of every level."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, ctx, pair):
        _require_grids(self, pair)
        levels = ctx.memo((self, pair.grids), lambda: self.cells(ctx, pair.grids))
        if pair.maps:
            return levels[pair.level]
        chosen = levels if pair.level is None else levels[pair.level : pair.level + 1]
        cells = torch.cat([x.flatten(1) for x in chosen], dim=1)
        return cells.repeat_interleave(pair.positions[1] // cells.shape[1], dim=1)


class AnchorRegion(Region):
    """A region that is defined per anchor; a cell of a map has the largest one of its anchors."""

    student_needs = ("anchors",)

    def bind(self, student_keys, teacher_keys):
        self.strides = strides_of_anchors(self, student_keys)

    def anchors(self, ctx) -> torch.Tensor:
        """Return the weights (N, R) of the anchors of all levels of the student."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, ctx, pair):
        _require_grids(self, pair)
        weights = ctx.memo((self, "anchors"), lambda: self.anchors(ctx))
        levels = anchor_levels(ctx, weights, pair.grids)
        if pair.maps:
            grid = pair.grids[pair.level]
            return levels[pair.level].view(len(weights), grid.height, grid.width, -1).amax(dim=-1)
        return torch.cat(levels, dim=1) if pair.level is None else levels[pair.level]


def anchor_levels(ctx, values: torch.Tensor, grids: Sequence[Grid]) -> List[torch.Tensor]:
    """Return ``values`` (N, R, ...) of the student's anchors split into the levels of ``grids``.

    Levels are found by their stride: a two-stage student has anchors on one level more than its
    RoI head reads.

    Raises:
        ValueError: there are no anchors on a level.
    """
    levels = values.split([len(boxes) for boxes in ctx.student["anchors"]], dim=1)
    return at_strides("anchors of the student", anchor_strides(ctx), levels, grids)


def strides_of_anchors(region: Region, student_keys) -> Tuple[int, ...]:
    """Return the strides of the levels with anchors.

    Raises:
        ValueError: the student has no anchors.
    """
    if "anchors" not in student_keys:
        raise ValueError(
            f"{type(region).__name__} needs 'anchors' of the student, which it does not have"
        )
    return student_keys["anchors"].strides


def anchor_strides(ctx) -> List[int]:
    """Return the strides of the levels of the student's anchors."""
    return ctx.student.tap.anchor_strides(ctx.student.model)


def at_strides(what: str, strides: Sequence[int], levels: Sequence, grids: Sequence[Grid]) -> List:
    """Return those of ``levels``, which have ``strides``, that belong to ``grids``.

    Raises:
        ValueError: a level is missing; ``what`` names the values.
    """
    by_stride = dict(zip(strides, levels))
    missing = [grid.stride for grid in grids if grid.stride not in by_stride]
    if missing:
        raise ValueError(
            f"{what} lie at strides {tuple(strides)}, none at {tuple(missing)}; compare other "
            "levels (levels= of the source) or use another region"
        )
    return [by_stride[grid.stride] for grid in grids]


def assignment_of(ctx) -> Assignment:
    """Return the student's own assignment of the step."""
    return ctx.student["assign"]


def _require_grids(region: Region, pair: Pair) -> None:
    if not pair.grids:
        raise ValueError(
            f"{type(region).__name__} weights cells of a pyramid, but the values of '{pair.key}' "
            "lie on none (RoIs, or maps behind SpatialSoftmax)"
        )


@KD_REGIONS.register()
class All(Region):
    """1 everywhere, padding included."""

    def __call__(self, ctx, pair):
        return pair.student.new_ones(pair.positions, dtype=torch.float32)


@KD_REGIONS.register()
class Valid(CellRegion):
    """1 on the cells that the image has by itself, 0 in the padding of larger ones in its batch."""

    def cells(self, ctx, grids):
        divisibility = ctx.student.model.backbone.size_divisibility
        device = ctx.student.model.device
        return [
            torch.stack([_valid(grid, size, divisibility, device) for size in ctx.image_sizes])
            for grid in grids
        ]


def _valid(grid: Grid, image_size: Tuple[int, int], divisibility: int, device) -> torch.Tensor:
    """(H, W) mask; the rule of :func:`kd_d2.modeling.layers.valid_anchor_mask`."""
    step = max(divisibility, 1)
    rows, columns = (-(-(-(-int(side) // step) * step) // grid.stride) for side in image_size)
    mask = torch.zeros(grid.height, grid.width, device=device)
    mask[:rows, :columns] = 1.0
    return mask


@KD_REGIONS.register()
class Assigned(AnchorRegion):
    """1 at the anchors that the student's own assigner labels as asked.

    "pos": foreground, "neg": background, "valid": either, "ignore": neither. For a two-stage
    student these are the RPN's anchors, matched without sampling.
    """

    def __init__(self, label: str = "pos"):
        """Raises ``ValueError`` if ``label`` is not one of the above."""
        if label not in ("pos", "neg", "valid", "ignore"):
            raise ValueError(f'Assigned: "pos", "neg", "valid" or "ignore", got {label!r}')
        self._label = label
        self.student_needs = ("anchors", "assign")

    def anchors(self, ctx):
        found = assignment_of(ctx)
        mask = {
            "pos": lambda: found.positive,
            "neg": lambda: found.valid & ~found.positive,
            "valid": lambda: found.valid,
            "ignore": lambda: ~found.valid,
        }[self._label]()
        return mask.float()


@KD_REGIONS.register()
class Complement(Region):
    """1 where a region of zeros and ones is 0, and 0 where it is not."""

    def __init__(self, region: Region):
        self._region = region

    def bind(self, student_keys, teacher_keys):
        _bind_parts(self, [self._region], student_keys, teacher_keys)

    @torch.no_grad()
    def __call__(self, ctx, pair):
        return (self._region(ctx, pair) == 0).float()


def _bind_parts(whole: Region, parts: Sequence[Region], student_keys, teacher_keys) -> None:
    """Bind ``parts``; ``whole`` needs what they need and is defined where all of them are."""
    for part in parts:
        part.bind(student_keys, teacher_keys)
    whole.student_needs = tuple(sorted({key for part in parts for key in part.student_needs}))
    whole.teacher_needs = tuple(sorted({key for part in parts for key in part.teacher_needs}))
    known = [set(part.strides) for part in parts if part.strides is not None]
    whole.strides = tuple(sorted(set.intersection(*known))) if known else None


@KD_REGIONS.register()
class Product(Region):
    """Product of the weights of several regions."""

    def __init__(self, *regions: Region):
        """Raises ``ValueError`` without a region."""
        if not regions:
            raise ValueError("Product needs at least one region")
        self._regions = regions

    def bind(self, student_keys, teacher_keys):
        _bind_parts(self, self._regions, student_keys, teacher_keys)

    @torch.no_grad()
    def __call__(self, ctx, pair):
        result = self._regions[0](ctx, pair)
        for region in self._regions[1:]:
            result = result * region(ctx, pair)
        return result
