"""The boxes of the T-head, B_t."""

from typing import List

from detectron2.config import configurable
from detectron2.structures import Instances
from torch import nn

from .labels import ProposalLabeler

__all__ = ["BoxSampler"]


class BoxSampler(nn.Module):
    """Random boxes of each image, a part of them positive; see ``ProposalLabeler.sample``.

    A module without parameters, so that a recorder sees the boxes of a step: a separate teacher
    looks at the same ones.
    """

    @configurable
    def __init__(
        self,
        *,
        labeler: ProposalLabeler,
        batch_size: int = 128,
        positive_fraction: float = 0.25,
    ):
        """
        Args:
            labeler: knows the background's index.
            batch_size: boxes of an image.
            positive_fraction: largest share of positives; negatives fill up.
        """
        super().__init__()
        self.labeler = labeler
        self.batch_size = batch_size
        self.positive_fraction = positive_fraction

    @classmethod
    def from_config(cls, cfg, labeler):
        heads = cfg.MODEL.ROI_HEADS
        return {
            "labeler": labeler,
            "batch_size": heads.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": heads.POSITIVE_FRACTION,
        }

    def forward(self, labelled: List[Instances]) -> List[Instances]:
        """Return the chosen boxes of each image, with all their fields."""
        return self.labeler.sample(labelled, self.batch_size, self.positive_fraction)
