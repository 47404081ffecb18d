"""MGD's adapter: a network that restores hidden positions of the student's map."""

import torch
from torch import nn

from .adapters import Adapter, ConvAdapter
from .registry import KD_ADAPTERS

__all__ = ["MaskedGenerator"]


@KD_ADAPTERS.register()
class MaskedGenerator(Adapter):
    """G(M * a(s)): random positions are hidden, two 3x3 convolutions restore them (MGD).

    ``a`` is a 1x1 convolution where the widths differ; M hides all channels of a position at once.
    G has 1 180 160 parameters a level at 256 channels. The mask is drawn from PyTorch's generator
    of the device, anew in every step.
    """

    def __init__(self, mask_ratio: float = 0.65):
        """
        Args:
            mask_ratio: probability that a position is hidden.

        Raises:
            ValueError: it is not in [0, 1).
        """
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"MaskedGenerator: mask_ratio must be in [0, 1), got {mask_ratio}")
        self.mask_ratio = mask_ratio
        self.align = ConvAdapter(1, only_if_needed=True)
        self.generators = nn.ModuleList()

    def build(self, widths):
        self.align.build(widths)
        self.generators = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(teacher, teacher, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(teacher, teacher, 3, padding=1),
            )
            for _, teacher in widths
        )

    def forward(self, student, index):
        aligned = self.align(student, index)
        positions = (len(aligned), 1, *aligned.shape[2:])
        hidden = torch.rand(positions, device=aligned.device) < self.mask_ratio
        return self.generators[index](aligned.masked_fill(hidden, 0.0))
