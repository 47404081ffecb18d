"""Joint-DetNAS: search, pruning and distillation of a detector in one loop (arXiv 2105.12971)."""

from . import elastic_heads, elastic_resnet  # noqa: F401  (they register themselves)
from .actions import STUDENT_ACTIONS, Action
from .config import add_morph_resnet_config, add_search_config
from .distiller import JointDetNAS
from .distiller_config import add_jointdetnas_config
from .elastic_config import add_elastic_resnet_config
from .evolve import StudentMorphism
from .morph_resnet import MorphResNet
from .presets import PRESETS, resolve
from .score import StudentScore
from .search import add_hill_climbing_config
from .space import Architecture, Block, Stream, parse
from .sparsity import BNSparsity, add_bnsparsity_config
from .subnet import Subnet, SubnetSpace
from .supernet import Supernet
from .surgery import select_channels
from .teacher import ElasticTeacher

__all__ = [
    "Action",
    "Architecture",
    "BNSparsity",
    "Block",
    "ElasticTeacher",
    "JointDetNAS",
    "MorphResNet",
    "PRESETS",
    "STUDENT_ACTIONS",
    "Stream",
    "StudentMorphism",
    "StudentScore",
    "Subnet",
    "SubnetSpace",
    "Supernet",
    "add_bnsparsity_config",
    "add_elastic_resnet_config",
    "add_hill_climbing_config",
    "add_jointdetnas_config",
    "add_morph_resnet_config",
    "add_search_config",
    "parse",
    "resolve",
    "select_channels",
]
