"""Distillation methods for comparison; importing this package registers them.

Every module is one method, with its config node.
"""

from .fitnets import FitNets
from .pair import Pair
from .pkd import PKD

__all__ = ["PKD", "FitNets", "Pair"]
