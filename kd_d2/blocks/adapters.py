"""Adapters: trainable maps from the student's width to the teacher's."""

from typing import Optional, Sequence, Tuple

import torch
from torch import nn

from .registry import KD_ADAPTERS

__all__ = ["Adapter", "ConvAdapter", "LinearAdapter"]


class Adapter(nn.Module):
    """Interface of adapters: modules of the distiller that are made when widths are known."""

    # widths of the pairs once the parameters exist; terms that share an adapter build it once
    built_for: Optional[Tuple[Tuple[int, int], ...]] = None

    def build(self, widths: Sequence[Tuple[int, int]]) -> None:
        """Create the parameters.

        Args:
            widths: per pair (student's channels, teacher's channels).
        """
        raise NotImplementedError

    def forward(self, student: torch.Tensor, index: int) -> torch.Tensor:
        """Return the student's values of pair ``index`` in the teacher's width."""
        raise NotImplementedError


def _per_pair(widths, shared: bool, make) -> nn.ModuleList:
    widths = list(widths)
    if not shared:
        return nn.ModuleList(make(*pair) for pair in widths)
    if len(set(widths)) > 1:
        raise ValueError(f"an adapter shared by all levels needs equal widths, got {widths}")
    return nn.ModuleList([make(*widths[0])])


@KD_ADAPTERS.register()
class ConvAdapter(Adapter):
    """A convolution per level that keeps the size, optionally followed by a ReLU."""

    def __init__(
        self,
        kernel_size: int = 1,
        relu: bool = False,
        std: Optional[float] = None,
        shared: bool = False,
        only_if_needed: bool = False,
    ):
        """
        Args:
            kernel_size: odd.
            relu: end with a ReLU.
            std: weights from a normal distribution cut at 2 std, bias 0; None: PyTorch's default.
            shared: one convolution for all levels.
            only_if_needed: identity where the widths already agree.

        Raises:
            ValueError: ``kernel_size`` is even.
        """
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"ConvAdapter: kernel_size must be odd, got {kernel_size}")
        self._kernel_size, self._relu, self._std = kernel_size, relu, std
        self._shared, self._only_if_needed = shared, only_if_needed
        self.layers = nn.ModuleList()

    def build(self, widths):
        self.layers = _per_pair(widths, self._shared, self._make)

    def _make(self, student: int, teacher: int) -> nn.Module:
        if self._only_if_needed and student == teacher:
            return nn.Identity()
        conv = nn.Conv2d(student, teacher, self._kernel_size, padding=self._kernel_size // 2)
        if self._std is not None:
            nn.init.trunc_normal_(conv.weight, std=self._std, a=-2 * self._std, b=2 * self._std)
            nn.init.zeros_(conv.bias)
        return nn.Sequential(conv, nn.ReLU()) if self._relu else conv

    def forward(self, student, index):
        return self.layers[0 if self._shared else index](student)


@KD_ADAPTERS.register()
class LinearAdapter(Adapter):
    """A linear layer on the last dimension of rows."""

    def __init__(self, only_if_needed: bool = False):
        """``only_if_needed``: identity where the widths already agree."""
        super().__init__()
        self._only_if_needed = only_if_needed
        self.layers = nn.ModuleList()

    def build(self, widths):
        self.layers = _per_pair(widths, False, self._make)

    def _make(self, student: int, teacher: int) -> nn.Module:
        if self._only_if_needed and student == teacher:
            return nn.Identity()
        return nn.Linear(student, teacher)

    def forward(self, student, index):
        return self.layers[index](student)
