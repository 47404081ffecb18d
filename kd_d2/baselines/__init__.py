"""Distillation methods for comparison; importing this package registers them.

Every module is one method, with its config node.
"""

from .cwd import CWD
from .fgd import FGD
from .fitnets import FitNets
from .ld import LD
from .mgd import MGD
from .pair import Pair
from .pkd import PKD
from .skd import SKD

__all__ = ["CWD", "FGD", "LD", "MGD", "PKD", "SKD", "FitNets", "Pair"]
