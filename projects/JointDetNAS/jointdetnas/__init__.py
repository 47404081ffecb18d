"""Joint-DetNAS: search, pruning and distillation of a detector in one loop (arXiv 2105.12971)."""

from .config import add_morph_resnet_config
from .morph_resnet import MorphResNet
from .presets import PRESETS, resolve
from .space import Architecture, Block, Stream, parse

__all__ = [
    "Architecture",
    "Block",
    "MorphResNet",
    "PRESETS",
    "Stream",
    "add_morph_resnet_config",
    "parse",
    "resolve",
]
