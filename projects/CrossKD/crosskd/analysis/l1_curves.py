"""L1 distances of a student's predictions to the teacher's and to the ground truth (Fig. 5).

The paper names the curves, but neither the branch nor the units; the definitions are ours:

===============  =================================================================================
``cls_teacher``  mean of |sigma(p^s) - sigma(p^t)| over all valid positions and classes
``cls_gt``       mean of |sigma(p^s) - target| over the positives, in the class of their box; the
                 target is that of the detector's loss: 1, for GFL the IoU of the student's box
``reg_teacher``  mean of |ltrb^s - ltrb^t| over the positives and the four sides, in strides
``reg_gt``       the same to the ground truth
===============  =================================================================================

Positives are those of the student's assigner. Means are over the whole set of images, not of means
per image. ltrb are the distances of the decoded box from the centre of the anchor.
"""

import os
import re
from typing import Dict, List, Tuple

import torch

from .dense import DenseBatch

__all__ = ["MEASURES", "L1Distances", "find_checkpoints", "l1_sums"]

MEASURES = ("cls_teacher", "cls_gt", "reg_teacher", "reg_gt")


def l1_sums(batch: DenseBatch) -> Dict[str, Tuple[float, int]]:
    """Measure -> (sum of the distances, number of values) of one batch."""
    counted, positive = batch.positions.counted, batch.positions.positive
    scores, teacher_scores = batch.student_scores, batch.teacher_scores
    own = scores[positive].gather(1, batch.labels[positive][:, None])[:, 0]
    sides = batch.distances(batch.decoded("student"))
    differences = {
        "cls_teacher": (scores - teacher_scores)[counted],
        "cls_gt": own - batch.class_targets(),
        "reg_teacher": sides - batch.distances(batch.decoded("teacher")),
        "reg_gt": sides - batch.distances(batch.matched()),
    }
    return {
        name: (float(values.abs().double().sum()), values.numel())
        for name, values in differences.items()
    }


class L1Distances:
    """Means over all batches that were added."""

    def __init__(self):
        self._sums = dict.fromkeys(MEASURES, 0.0)
        self._counts = dict.fromkeys(MEASURES, 0)

    @torch.no_grad()
    def add(self, batch: DenseBatch) -> None:
        for name, (value, count) in l1_sums(batch).items():
            self._sums[name] += value
            self._counts[name] += count

    def means(self) -> Dict[str, float]:
        """Measure -> mean; NaN if there was nothing to measure."""
        return {
            name: self._sums[name] / self._counts[name] if self._counts[name] else float("nan")
            for name in MEASURES
        }


def find_checkpoints(folder: str) -> List[Tuple[int, str]]:
    """(number of iterations trained, path) of the periodic checkpoints of a run, in order.

    ``model_0000099.pth`` is written after 100 iterations. A ``model_final.pth`` alone does not
    count: it says nothing about the course of the training.

    Raises:
        ValueError: there is none.
    """
    found = []
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        match = re.fullmatch(r"model_(\d+)\.pth", name)
        if match:
            found.append((int(match.group(1)) + 1, os.path.join(folder, name)))
    if not found:
        raise ValueError(
            f"there is no model_<iteration>.pth in '{folder}'; train with "
            "SOLVER.CHECKPOINT_PERIOD below SOLVER.MAX_ITER"
        )
    return sorted(found)
