"""``KD.INIT_STUDENT``: parts of the student that are copied from the teacher, maybe for good."""

from typing import Dict, Iterable, List

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["FrozenStatistics", "copy_from_teacher", "freeze_prefixes"]


def freeze_prefixes(cfg: CfgNode, student: nn.Module) -> None:
    """Exclude what ``KD.INIT_STUDENT.FREEZE`` names from training; before the optimizer exists.

    Raises:
        ValueError: a prefix matches no parameter or buffer.
    """
    node = cfg.KD.INIT_STUDENT
    if cfg.KD.ENABLED and node.FREEZE:
        parameters = dict(student.named_parameters())
        for name in _with_prefixes(student.state_dict(), node.PREFIXES, "student"):
            if name in parameters:
                parameters[name].requires_grad_(False)


@torch.no_grad()
def copy_from_teacher(
    student: nn.Module, state: Dict[str, torch.Tensor], prefixes: Iterable[str]
) -> None:
    """Copy the entries of a teacher's state dict that start with one of ``prefixes``.

    Raises:
        ValueError: a prefix matches nothing on one side, an entry is missing in the teacher, or
            shapes differ; the message names the entry.
    """
    own = student.state_dict()
    _with_prefixes(state, prefixes, "teacher")
    for name in _with_prefixes(own, prefixes, "student"):
        if name not in state:
            raise ValueError(f"KD.INIT_STUDENT: the teacher has no '{name}'")
        if state[name].shape != own[name].shape:
            raise ValueError(
                f"KD.INIT_STUDENT: '{name}' has shape {tuple(own[name].shape)} in the student and "
                f"{tuple(state[name].shape)} in the teacher"
            )
        own[name].copy_(state[name])


class FrozenStatistics(HookBase):
    """Keeps BatchNorm below the given prefixes in eval mode: its statistics are frozen as well.

    Before each step, because training starts, and evaluation ends, with ``model.train()``.
    """

    def __init__(self, student: nn.Module, prefixes: Iterable[str]):
        """
        Args:
            prefixes: as KD.INIT_STUDENT.PREFIXES.
        """
        prefixes = tuple(prefixes)
        self._modules = [
            module
            for path, module in student.named_modules()
            if isinstance(module, _BatchNorm) and f"{path}.running_mean".startswith(prefixes)
        ]

    def before_step(self):
        for module in self._modules:
            module.eval()


def _with_prefixes(names: Iterable[str], prefixes: Iterable[str], where: str) -> List[str]:
    names = list(names)
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(
                f"KD.INIT_STUDENT.PREFIXES: no parameter or buffer of the {where} starts with "
                f"'{prefix}'"
            )
    return [name for name in names if name.startswith(tuple(prefixes))]
