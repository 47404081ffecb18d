"""Blocks that distillation losses are made of; see :class:`kd_d2.blocks.PairTerm`.

A method chooses one of each: a source of pairs, a region, an adapter, a transform, a distance, a
normaliser. All are registered, so that a config can name them, and are plain classes that Python
code composes.
"""

from .adapters import Adapter, ConvAdapter, LinearAdapter
from .box_distances import GIoU, LogIoU, SideL1, TeacherBounded, boxes_of
from .context_block import ContextBlock
from .distances import BCE, KL, L1, QFL, Cosine, Distance, SmoothL1, SquaredL2
from .locations import anchor_rows, at_anchors, rows_of_anchors
from .masked_generator import MaskedGenerator
from .normalisers import Const, Elements, Images, Normaliser, Positives, Weights
from .pair import Block, Grid, Pair
from .rank import Objects, RankKL
from .regions import (
    VLR,
    All,
    AnchorRegion,
    Assigned,
    BoxRegion,
    CellRegion,
    Complement,
    Gaussian,
    GISelect,
    GTCells,
    GTCentre,
    Matched,
    NearAnchor,
    PredDiff,
    Product,
    Region,
    ScaledBackground,
    ScaledGT,
    StudentScore,
    TeacherConf,
    Valid,
    anchor_levels,
    assignment_of,
    fpn_level,
)
from .registry import (
    KD_ADAPTERS,
    KD_DISTANCES,
    KD_NORMALISERS,
    KD_REGIONS,
    KD_SOURCES,
    KD_TRANSFORMS,
    build_block,
)
from .relation import PairwiseDistance, Vectors
from .roi_sets import DenseProposals, GeneralInstances, GroundTruth, Proposals, RoISet, StudentBoxes
from .roi_source import RoISource, pyramid_pooler
from .sources import DenseSource, MapSource, Source
from .ssim import SSIM, structural_similarity
from .term import LEVELS, PairDistiller, PairTerm
from .transforms import (
    Flatten,
    L2Norm,
    Sigmoid,
    Softmax,
    SpatialSoftmax,
    Standardise,
    Transform,
)
from .trunk_source import TrunkSource
