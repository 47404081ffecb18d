"""What the blocks hand to each other: two tensors that are compared, and where they lie."""

from dataclasses import dataclass, replace
from typing import Any, Mapping, Optional, Tuple

import torch

from kd_d2.distillation import KeyInfo

__all__ = ["Block", "Grid", "Pair"]


@dataclass(frozen=True)
class Grid:
    """Cells of a pyramid level: cell (y, x) covers ``stride`` input pixels to either side."""

    height: int
    width: int
    stride: int


@dataclass
class Pair:
    """Values of student and teacher that are compared position by position.

    Attributes:
        student, teacher: tensors of equal leading shape. ``(N, C, H, W)`` for maps, one pair a
            level; ``(..., C)`` for rows: dense predictions (N, R, C) in the order of the anchors,
            RoIs (M, C), ...
        maps: True for the first form.
        grids: all levels that the source compares, fine to coarse; empty for rows that lie on no
            grid (RoIs).
        level: index in ``grids``; None for rows of all levels together.
        key: key of the student's values, e.g. "neck".
        rois: what a row stands for, if not a cell: the source's own description of its boxes.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    maps: bool
    grids: Tuple[Grid, ...] = ()
    level: Optional[int] = None
    key: str = ""
    rois: Any = None

    @property
    def channel_dim(self) -> int:
        return 1 if self.maps else -1

    @property
    def num_channels(self) -> int:
        return self.teacher.shape[self.channel_dim]

    @property
    def positions(self) -> Tuple[int, ...]:
        """Shape of what remains when the channels are summed: (N, H, W) or (...)."""
        shape = self.student.shape
        return (shape[0], *shape[2:]) if self.maps else tuple(shape[:-1])

    def map(self, function) -> "Pair":
        """Return the pair with ``function`` applied to both sides."""
        return replace(self, student=function(self.student), teacher=function(self.teacher))


class Block:
    """Base of all blocks: what it reads, and its look at the two networks before the first step.

    Attributes:
        student_needs, teacher_needs: keys that are read in a step; final after :meth:`bind`.
    """

    student_needs: Tuple[str, ...] = ()
    teacher_needs: Tuple[str, ...] = ()

    def bind(
        self, student_keys: Mapping[str, KeyInfo], teacher_keys: Mapping[str, KeyInfo]
    ) -> None:
        """Called once when the distiller is built.

        Raises:
            ValueError: these two networks lack something that the block needs; the message names
                the key, both values and the mend.
        """
