"""Distillation methods for comparison; importing this package registers them.

Every module is one method, with its config node.
"""

from .fitnets import FitNets
from .ld import LD
from .pair import Pair
from .pkd import PKD

__all__ = ["LD", "PKD", "FitNets", "Pair"]
