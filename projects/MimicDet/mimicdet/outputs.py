"""What both heads return about boxes."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["HeadOutput"]


class HeadOutput(NamedTuple):
    """Features and predictions of R boxes, those of all images in order; fp32 (or fp64).

    The features are D-dimensional vectors *before* their ReLU, the predictions are linear in the
    rectified ones. Both features are the same tensor where a design does not split the branches.
    """

    cls_feature: Tensor
    """(R, D)"""
    reg_feature: Tensor
    """(R, D)"""
    logits: Tensor
    """(R, K+1), before the softmax; the last one is the background's."""
    deltas: Tensor
    """(R, 4), class-agnostic, relative to the adjusted box, in the coding of the second stage."""

    def rows(self, index: Tensor) -> "HeadOutput":
        """The boxes that ``index``, an (R',) tensor of row numbers, selects."""
        return HeadOutput(*(x[index] for x in self))

    def detach(self) -> "HeadOutput":
        """The same numbers without graph."""
        return HeadOutput(*(x.detach() for x in self))
