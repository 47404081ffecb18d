"""Distillation methods for comparison; importing this package registers them."""

from .pkd import PKD

__all__ = ["PKD"]
