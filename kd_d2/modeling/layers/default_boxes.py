"""SSD's default boxes."""

import math
from typing import Sequence, Tuple

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import Tensor

__all__ = ["DefaultBoxGenerator"]


class DefaultBoxGenerator(DefaultAnchorGenerator):
    """Anchors of SSD (Liu et al., ECCV 2016, section 2.2), centred on (i + 1/2) * stride.

    A level with the sizes min and max and the ratios r has per cell, in this order, squares of
    side min and sqrt(min * max), then for each r a box min*sqrt(r) wide and min/sqrt(r) high and
    its transpose. They are not clipped to the image. Called with feature maps as Detectron2's
    generators are.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[float],
        aspect_ratios: Sequence[Sequence[float]],
        strides: Sequence[int],
    ):
        """
        Args:
            sizes: L + 1 increasing sides in pixels of the input; level i has min ``sizes[i]`` and
                max ``sizes[i + 1]``.
            aspect_ratios: per level, each above 1; without 1 and without reciprocals.
            strides: of the L levels, pixels.

        Raises:
            ValueError: the three do not fit, or a value is out of range.
        """
        num_levels = len(strides)
        if len(sizes) != num_levels + 1 or len(aspect_ratios) != num_levels:
            raise ValueError(
                f"MODEL.SSD.STRIDES has {num_levels} levels, so SIZES needs {num_levels + 1} "
                f"entries and ASPECT_RATIOS {num_levels}; they have {len(sizes)} and "
                f"{len(aspect_ratios)}"
            )
        if min(sizes) <= 0 or any(b <= a for a, b in zip(sizes, sizes[1:])):
            raise ValueError(f"MODEL.SSD.SIZES must be positive and increase, got {list(sizes)}")
        if any(ratio <= 1 for level in aspect_ratios for ratio in level):
            raise ValueError(
                "MODEL.SSD.ASPECT_RATIOS must be above 1 (1 and the reciprocals are added), got "
                f"{[list(level) for level in aspect_ratios]}"
            )
        super().__init__(
            sizes=list(zip(sizes, sizes[1:])),
            aspect_ratios=[tuple(level) for level in aspect_ratios],
            strides=list(strides),
            offset=0.5,
        )

    def generate_cell_anchors(
        self, sizes: Tuple[float, float], aspect_ratios: Sequence[float]
    ) -> Tensor:
        """(2 + 2 * ratios, 4) boxes around (0, 0)."""
        low, high = sizes
        shapes = [(low, low), (math.sqrt(low * high),) * 2]
        for ratio in aspect_ratios:
            root = math.sqrt(ratio)
            shapes += [(low * root, low / root), (low / root, low * root)]
        half = torch.tensor(shapes) / 2
        return torch.cat((-half, half), dim=1)
