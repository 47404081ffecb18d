"""Pair sources: which values of student and teacher are compared."""

from typing import List, Sequence, Tuple

import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch.nn import functional as F

from kd_d2.distillation import require_equal, sigmoid_classes
from kd_d2.distillation.recorder import near_matches

from .pair import Block, Grid, Pair
from .registry import KD_SOURCES

__all__ = ["DenseSource", "MapSource", "Source"]


class Source(Block):
    """Interface of pair sources.

    Attributes (final after ``bind``):
        widths: per pair (student's channels, teacher's channels), for adapters.
        strides: per level of the pairs' grids, input pixels a cell; empty without grids.
    """

    widths: Tuple[Tuple[int, int], ...] = ()
    strides: Tuple[int, ...] = ()

    def __call__(self, ctx) -> List[Pair]:
        """Return the pairs of this step; their number is that of ``widths``."""
        raise NotImplementedError


@KD_SOURCES.register()
class MapSource(Source):
    """Feature maps of a key that is a list over levels: the pyramid, or a stage of a tower.

    Levels are paired by stride (a Faster R-CNN with P2-P5 and a RetinaNet with P3-P7 share P3, P4
    and P5), or by index, as PKD's official code does for such pairs.
    """

    def __init__(
        self,
        key: str = "neck",
        teacher_key: str = "",
        pair: str = "stride",
        levels: Sequence[int] = (),
        resize: str = "none",
    ):
        """
        Args:
            key: of the student.
            teacher_key: of the teacher; empty: the same.
            pair: "stride" or "index".
            levels: indices into the paired levels, fine to coarse; empty: all.
            resize: maps of different size are an error ("none"), or the "student"'s, or the
                "teacher"'s are resized bilinearly to the other's size.

        Raises:
            ValueError: ``pair`` or ``resize`` is not one of the above.
        """
        if pair not in ("stride", "index"):
            raise ValueError(f'MapSource: pair must be "stride" or "index", got {pair!r}')
        if resize not in ("none", "student", "teacher"):
            raise ValueError(
                f'MapSource: resize must be "none", "student" or "teacher", got {resize!r}'
            )
        self.key, self.teacher_key = key, teacher_key or key
        self.student_needs, self.teacher_needs = (self.key,), (self.teacher_key,)
        self._pairing, self._levels, self._resize = pair, tuple(levels), resize
        self.indices: Tuple[Tuple[int, int], ...] = ()

    def _levels_of(self, side: str, keys) -> List[Tuple[int, int]]:
        """Return (stride, channels) of the maps of ``side``, fine to coarse."""
        key = self.key if side == "student" else self.teacher_key
        if key not in keys:
            raise ValueError(
                f"MapSource compares '{key}', which the {side} does not have; similar: "
                f"{near_matches(key, keys, 8)}"
            )
        return keys[key].levels

    def _read(self, side: str, view) -> List[torch.Tensor]:
        """Return the maps of ``side`` in the order of :meth:`_levels_of`."""
        found = view[self.key if side == "student" else self.teacher_key]
        # a single level, e.g. "neck.p4", is a tensor
        return [found] if isinstance(found, torch.Tensor) else found

    def bind(self, student_keys, teacher_keys):
        ours = self._levels_of("student", student_keys)
        theirs = self._levels_of("teacher", teacher_keys)
        our_strides, their_strides = ([stride for stride, _ in x] for x in (ours, theirs))
        if self._pairing == "stride":
            pairs = [
                (i, their_strides.index(stride))
                for i, stride in enumerate(our_strides)
                if stride in their_strides
            ]
        else:
            shorter = min(len(ours), len(theirs))
            pairs = [(i, i) for i in range(shorter)]
        if not pairs:
            raise ValueError(
                f"MapSource: '{self.key}' of the student has strides "
                f"{tuple(our_strides)}, '{self.teacher_key}' of the teacher "
                f"{tuple(their_strides)}: no level in common; pair "
                'by "index" and resize'
            )
        if any(not 0 <= level < len(pairs) for level in self._levels):
            raise ValueError(
                f"MapSource: levels {self._levels} of '{self.key}', but {len(pairs)} levels are "
                "paired"
            )
        self.indices = tuple(pairs[i] for i in self._levels) if self._levels else tuple(pairs)
        if self._resize == "none":
            for i, j in self.indices:
                if our_strides[i] != their_strides[j]:
                    raise ValueError(
                        f"MapSource: level {i} of the student's '{self.key}' has stride "
                        f"{our_strides[i]}, its partner in the teacher {their_strides[j]}; "
                        'pair by "stride", or resize one side'
                    )
        # a resized map has the cells of the other side
        self.strides = tuple(
            their_strides[j] if self._resize == "student" else our_strides[i]
            for i, j in self.indices
        )
        self.widths = tuple((ours[i][1], theirs[j][1]) for i, j in self.indices)

    def __call__(self, ctx):
        ours, theirs = self._read("student", ctx.student), self._read("teacher", ctx.teacher)
        pairs = [self._sized(ours[i], theirs[j]) for i, j in self.indices]
        grids = tuple(
            Grid(*student.shape[-2:], stride) for (student, _), stride in zip(pairs, self.strides)
        )
        return [
            Pair(student, teacher, True, grids, level, self.key)
            for level, (student, teacher) in enumerate(pairs)
        ]

    def _sized(self, student, teacher):
        if student.shape[-2:] == teacher.shape[-2:]:
            return student, teacher
        if self._resize == "none":
            raise ValueError(
                f"MapSource: maps of '{self.key}' differ in size, student "
                f"{tuple(student.shape[-2:])}, teacher {tuple(teacher.shape[-2:])}; resize one side"
            )

        def resized(x, like):
            size = like.shape[-2:]
            return F.interpolate(x, size=size, mode="bilinear", align_corners=False)

        if self._resize == "student":
            return resized(student, teacher), teacher
        return student, resized(teacher, student)


@KD_SOURCES.register()
class DenseSource(Source):
    """Raw predictions of dense heads as rows, in the order of the anchors.

    "cls": (N, R, K) logits; "box": (N, R, D) raw deltas, or (N, R, 4, n + 1) logits of GFL's
    distributions with ``bins``; "ctr": (N, R, 1) logits.
    """

    def __init__(self, output: str = "cls", bins: bool = False, per_level: bool = False):
        """
        Args:
            output: "cls", "box" or "ctr".
            bins: for "box": one distribution over n + 1 bins per side; D of the rows is n + 1.
            per_level: one pair a level instead of one of all levels.

        Raises:
            ValueError: another output, or bins of another than "box".
        """
        if output not in ("cls", "box", "ctr"):
            raise ValueError(f'DenseSource: output must be "cls", "box" or "ctr", got {output!r}')
        if bins and output != "box":
            raise ValueError(f'DenseSource: bins are those of "box", not of {output!r}')
        self.key = f"pred.{output}"
        self._output, self._bins, self._per_level = output, bins, per_level
        self.student_needs = (self.key, "codec")
        self.teacher_needs = (self.key, "codec")

    def bind(self, student_keys, teacher_keys):
        for side, keys in (("student", student_keys), ("teacher", teacher_keys)):
            if self.key not in keys:
                raise ValueError(
                    f"DenseSource compares '{self.key}', which the {side} does not have: both must "
                    "be dense detectors of one kind"
                )
        for key in (self.key, "codec", "anchors"):
            require_equal("DenseSource", key, student_keys, teacher_keys)
        self._classes = 0
        if self._output == "cls":
            self._classes = sigmoid_classes("DenseSource", "student", student_keys)
        facts = dict(student_keys["codec"].signature[1:])
        self._box_dim = facts.get("box_dim", 4)
        if self._bins and self._box_dim <= 4:
            raise ValueError(
                "DenseSource(bins=True) compares distributions over the bins of box sides (GFL), "
                f"but these detectors predict {self._box_dim} numbers per box"
            )
        self.strides = student_keys[self.key].strides
        dim = self._dim()
        self.widths = ((dim, dim),) * (len(self.strides) if self._per_level else 1)

    def _dim(self) -> int:
        if self._bins:
            return self._box_dim // 4
        return {"cls": self._classes, "box": self._box_dim, "ctr": 1}[self._output]

    def __call__(self, ctx):
        dim = {"cls": self._classes, "box": self._box_dim, "ctr": 1}[self._output]
        sides = [
            [permute_to_N_HWA_K(x, dim) for x in view[self.key]]
            for view in (ctx.student, ctx.teacher)
        ]
        if self._bins:
            sides = [[x.reshape(*x.shape[:2], 4, dim // 4) for x in side] for side in sides]
        grids = tuple(
            Grid(*x.shape[-2:], stride) for x, stride in zip(ctx.student[self.key], self.strides)
        )
        if self._per_level:
            return [
                Pair(s, t, False, grids, level, self.key)
                for level, (s, t) in enumerate(zip(*sides))
            ]
        student, teacher = (torch.cat(side, dim=1) for side in sides)
        return [Pair(student, teacher, False, grids, None, self.key)]
