"""Distillation methods for comparison; importing this package registers them.

Every module is one method, with its config node.
"""

from .cwd import CWD
from .defeat import DeFeat
from .fgd import FGD
from .fgfi import FGFI
from .fine_grained import FineGrained
from .fitnets import FitNets
from .frs import FRS
from .gid import GID
from .head import HEAD
from .inside_gt import InsideGT
from .ld import LD
from .main_region import MainRegion
from .mgd import MGD
from .mimic import Mimic
from .pair import Pair
from .pfi import PFI
from .pkd import PKD
from .rank_mimic import RankMimic
from .roi_imitation import RoIImitation
from .skd import SKD
from .tadf import TADF

__all__ = [
    "CWD",
    "FGD",
    "FGFI",
    "FRS",
    "GID",
    "HEAD",
    "LD",
    "MGD",
    "PFI",
    "PKD",
    "SKD",
    "TADF",
    "DeFeat",
    "FineGrained",
    "FitNets",
    "InsideGT",
    "MainRegion",
    "Mimic",
    "Pair",
    "RankMimic",
    "RoIImitation",
]
