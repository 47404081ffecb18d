"""Joint-DetNAS: search, pruning and distillation of a detector in one loop (arXiv 2105.12971)."""

from .config import add_morph_resnet_config, add_search_config
from .morph_resnet import MorphResNet
from .presets import PRESETS, resolve
from .score import StudentScore
from .space import Architecture, Block, Stream, parse
from .surgery import select_channels

__all__ = [
    "Architecture",
    "Block",
    "MorphResNet",
    "PRESETS",
    "Stream",
    "StudentScore",
    "add_morph_resnet_config",
    "add_search_config",
    "parse",
    "resolve",
    "select_channels",
]
