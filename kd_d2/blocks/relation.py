"""Relations between the rows of an image: PairwiseDistance."""

import torch
from torch.nn import functional as F

from .distances import Distance
from .pair import Pair
from .registry import KD_DISTANCES, KD_TRANSFORMS
from .transforms import Transform

__all__ = ["PairwiseDistance", "Vectors", "pairwise_distances"]


@KD_TRANSFORMS.register()
class Vectors(Transform):
    """Pooled features (M, C, h, w) as rows (M, C*h*w): one vector per box."""

    def __call__(self, pair):
        return Pair(
            pair.student.flatten(1),
            pair.teacher.flatten(1),
            False,
            (),
            None,
            pair.key,
            pair.rois,
        )


def pairwise_distances(rows: torch.Tensor) -> torch.Tensor:
    """(K, K) Euclidean distances of (K, D) rows; the gradient at distance 0 is 0."""
    squared = (rows[:, None] - rows[None]).square().sum(dim=2)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)


@KD_DISTANCES.register()
class PairwiseDistance(Distance):
    """Huber loss (beta 1) between the distances d_ij of the K boxes of an image in both networks.

    Each side's distances are divided by their mean over i != j. A row gets sum_j / (K^2 - K), so
    that the sum over an image is its mean; 0 if K < 3, where normalised distances are all 1. The
    pair is one of RoIs. Relation loss of GID (Dai et al., CVPR 2021), unverified: known from the
    paper and a port. Relations within images, not across them, are our decision.
    """

    def __call__(self, ctx, pair):
        sizes = [len(boxes) for boxes in pair.rois]
        images = zip(pair.student.split(sizes), pair.teacher.split(sizes))
        return torch.cat([self._image(student, teacher) for student, teacher in images])

    @staticmethod
    def _image(student, teacher):
        number = len(student)
        if number < 3:
            return 0.0 * student.sum(dim=1)
        pairs = number * (number - 1)
        ours, theirs = (
            d / (d.sum() / pairs).clamp(min=1e-6)
            for d in map(pairwise_distances, (student, teacher))
        )
        return F.smooth_l1_loss(ours, theirs, reduction="none").sum(dim=1) / pairs
