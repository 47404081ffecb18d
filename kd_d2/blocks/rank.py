"""Ranking of the positives of an object: RankKL, and the number of objects as normaliser."""

from typing import Tuple

import torch

from kd_d2.distillation import Assignment
from kd_d2.modeling.layers import paired_iou

from .box_distances import boxes_of
from .distances import Distance
from .normalisers import Normaliser
from .pair import Pair
from .regions import assignment_of
from .registry import KD_DISTANCES, KD_NORMALISERS

__all__ = ["Objects", "RankKL", "grouped_log_softmax", "object_groups"]


def object_groups(ctx, pair: Pair) -> Tuple[torch.Tensor, torch.Tensor, int]:
    """Number the objects that have positives.

    Positives of one image belong to one object if box and class of their ground truth are equal;
    objects that are equal in both cannot be told apart and count as one.

    Returns:
        (N, R) mask of the positives; (P,) number of the object of each; number of objects.

    Raises:
        ValueError: the pair is not of all anchors.
    """
    found = assignment_of(ctx)
    if tuple(pair.positions[:2]) != tuple(found.labels.shape):
        raise ValueError(
            f"ranks are compared among all anchors {tuple(found.labels.shape)}, but '{pair.key}' "
            f"has the positions {tuple(pair.positions)}; use DenseSource with per_level=False"
        )
    return ctx.memo("object_groups", lambda: _group(found))


@torch.no_grad()
def _group(found: Assignment) -> Tuple[torch.Tensor, torch.Tensor, int]:
    positive = found.positive
    image = torch.nonzero(positive)[:, :1].to(found.boxes.dtype)
    label = found.labels[positive][:, None].to(found.boxes.dtype)
    rows = torch.cat((image, label, found.boxes[positive]), dim=1)
    objects, group = torch.unique(rows, dim=0, return_inverse=True)
    return positive, group, len(objects)


def grouped_log_softmax(values: torch.Tensor, group: torch.Tensor, number: int) -> torch.Tensor:
    """Log-softmax of (P,) values within each of ``number`` groups; ``group`` (P,) says which."""
    largest = values.detach().new_full((number,), -float("inf"))
    largest = largest.scatter_reduce(0, group, values.detach(), "amax")
    shifted = values - largest[group]
    total = values.new_zeros(number).index_add(0, group, shifted.exp())
    return shifted - total.log()[group]


@KD_DISTANCES.register()
class RankKL(Distance):
    """KL(softmax_j(t_j) || softmax_j(s_j)) over the positives j of every object.

    With quality "score", of pairs of ``DenseSource("cls")``, t_j and s_j are the probabilities of
    the object's class; with "iou", of ``DenseSource("box")``, the IoUs of the decoded boxes
    with the object's. A position gets its term of the sum, 0 where it is no positive.

    Rank mimicking (Li et al., Knowledge Distillation for Object Detection via Rank Mimicking and
    Prediction-guided Feature Imitation, AAAI 2022). Unverified: known from the paper and a port.
    That one sorts both sides for themselves, so that a reversed ranking costs nothing; here anchors
    keep their order. Temperature 1 and probabilities instead of logits are our decision.
    """

    student_needs = ("anchors", "assign", "codec")

    def __init__(self, quality: str = "score", temperature: float = 1.0):
        """Raises ``ValueError`` unless ``quality`` is as above and ``temperature`` positive."""
        if quality not in ("score", "iou") or not temperature > 0:
            raise ValueError(
                'RankKL: quality must be "score" or "iou" and temperature positive, got '
                f"{quality!r} and {temperature}"
            )
        self._qualities = self._scores if quality == "score" else self._ious
        self._temperature = temperature

    def __call__(self, ctx, pair):
        positive, group, number = object_groups(ctx, pair)
        student, teacher = (
            grouped_log_softmax(q / self._temperature, group, number)
            for q in self._qualities(ctx, pair, positive)
        )
        values = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True)
        # one of them has a graph also when there is no positive
        result = values.new_zeros(positive.shape).masked_scatter(positive, values)
        return result + 0.0 * student.sum()

    @staticmethod
    def _scores(ctx, pair, positive):
        classes = assignment_of(ctx).labels[positive][:, None]
        sides = (pair.student, pair.teacher)
        return [x[positive].gather(1, classes)[:, 0].sigmoid() for x in sides]

    @staticmethod
    def _ious(ctx, pair, positive):
        target = assignment_of(ctx).boxes[positive]
        sides = (pair.student, pair.teacher)
        return [paired_iou(boxes_of(ctx, x, pair)[positive], target) for x in sides]


@KD_NORMALISERS.register()
class Objects(Normaliser):
    """Number of the rank's objects that have positives, at least 1."""

    student_needs = ("assign",)

    def __call__(self, ctx, pair, weights):
        return weights.new_tensor(float(max(object_groups(ctx, pair)[2], 1)))
