"""Where ground truth and teacher ask a student for different class scores (Fig. 2)."""

from dataclasses import dataclass
from typing import Dict, List

import torch

from .dense import DenseBatch

__all__ = ["LevelConflict", "conflict_maps", "count_conflicts"]


@dataclass
class LevelConflict:
    """One level of one image: A anchors per cell, K classes.

    Attributes:
        ground_truth: (A, K, H, W) targets in 0..1.
        teacher: (A, K, H, W), sigma of the teacher's logits.
        counted: (A, H, W) bool, False at ignored anchors and outside the image.
        positive: (A, H, W) bool.
        conflict: (A, H, W) bool: counted, and the two differ in some class by more than the
            threshold.
        stride: pixels per cell.
    """

    ground_truth: torch.Tensor
    teacher: torch.Tensor
    counted: torch.Tensor
    positive: torch.Tensor
    conflict: torch.Tensor
    stride: int

    @property
    def difference(self) -> torch.Tensor:
        """(A, K, H, W) |target - sigma(t)|; 0 where it does not count."""
        return (self.ground_truth - self.teacher).abs() * self.counted[:, None]


def conflict_maps(
    batch: DenseBatch, threshold: float, target: str = "detector"
) -> List[LevelConflict]:
    """The levels of a batch of one image.

    Args:
        threshold: in 0..1; the paper gives none.
        target: see :meth:`.dense.DenseBatch.class_targets`.

    Raises:
        ValueError: the threshold is outside its range.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"the threshold of a conflict must lie in [0, 1), got {threshold}")
    positive, counted = batch.positions.positive[0], batch.positions.counted[0]
    teacher = batch.teacher_scores[0]
    wanted = torch.zeros_like(teacher)
    rows = positive.nonzero()[:, 0]
    wanted[rows, batch.labels[0, rows]] = batch.class_targets(target)
    conflict = ((wanted - teacher).abs() > threshold).any(dim=1) & counted
    result, start = [], 0
    for (height, width), stride in zip(batch.grid_sizes, batch.strides):
        end = start + height * width * batch.num_anchors

        def grid(values):
            # (H*W*A, ...) -> (A, ..., H, W)
            values = values[start:end].reshape(height, width, batch.num_anchors, -1)
            return values.permute(2, 3, 0, 1)

        result.append(
            LevelConflict(
                grid(wanted),
                grid(teacher),
                grid(counted)[:, 0],
                grid(positive)[:, 0],
                grid(conflict)[:, 0],
                stride,
            )
        )
        start = end
    return result


def count_conflicts(levels: List[LevelConflict]) -> Dict[str, int]:
    """Number of counted positions and of conflicts, in all and at the positives."""
    return {
        "positions": sum(int(x.counted.sum()) for x in levels),
        "conflicts": sum(int(x.conflict.sum()) for x in levels),
        "positives": sum(int(x.positive.sum()) for x in levels),
        "positive_conflicts": sum(int((x.conflict & x.positive).sum()) for x in levels),
    }
