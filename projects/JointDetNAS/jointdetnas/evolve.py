"""f_evolve: the student's part of a search step, S_new = f_evolve(S_old, action)."""

import itertools
from typing import Any, Dict, Iterable, List, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor, nn

# the modules register their actions
from . import add_layer, channel_pruning, layer_pruning, rearrange  # noqa: F401
from .actions import STUDENT_ACTIONS, Action, StudentAction
from .space import Architecture
from .surgery import bottom_up_of

__all__ = ["StudentMorphism", "calibration_images"]


class StudentMorphism:
    """The actions that may change a student (Sec. 3.1.2 and appendix A.1.2 of the paper)."""

    @configurable
    def __init__(self, *, actions: Sequence[StudentAction]):
        """
        Args:
            actions: instances of different kinds.
        """
        self.actions: Dict[str, StudentAction] = {action.name: action for action in actions}

    @classmethod
    def from_config(cls, cfg, root: Architecture) -> Dict[str, Any]:
        """Read ``SEARCH.STUDENT_ACTIONS``; ``root`` is the base detector's architecture."""
        known = {name: action for name, action in STUDENT_ACTIONS}
        for name in cfg.SEARCH.STUDENT_ACTIONS:
            if name not in known:
                raise ValueError(
                    f"SEARCH.STUDENT_ACTIONS names '{name}', known are {sorted(known)}"
                )
        return {"actions": [known[name](cfg, root) for name in cfg.SEARCH.STUDENT_ACTIONS]}

    def legal(self, architecture: Architecture) -> Dict[str, List[Action]]:
        """Legal actions by kind, kinds without any left out; depends on the architecture only."""
        choices = {name: action.choices(architecture) for name, action in self.actions.items()}
        return {name: actions for name, actions in choices.items() if actions}

    def needs_images(self, architecture: Architecture, action: Action) -> bool:
        """True if :meth:`evolve` measures features for this action."""
        return self._kind(action).needs_images(architecture, action)

    def evolve(self, model: nn.Module, action: Action, images: Sequence[Tensor] = ()) -> nn.Module:
        """Return the new student with inherited weights; the old one is left as it is.

        Args:
            model: detector with a MorphResNet.
            action: a legal one.
            images: batches as from :func:`calibration_images`; needed only if
                :meth:`needs_images`.

        Raises:
            ValueError: the action is not legal.
        """
        architecture = bottom_up_of(model).architecture
        if action not in self._kind(action).choices(architecture):
            raise ValueError(f"the action '{action}' is not legal for {architecture}")
        return self._kind(action).apply(model, action, images)

    def _kind(self, action: Action) -> StudentAction:
        if action.name not in self.actions:
            raise ValueError(f"the action '{action}' is none of {sorted(self.actions)}")
        return self.actions[action.name]


@torch.no_grad()
def calibration_images(
    model: nn.Module, loader: Iterable[List[Dict[str, Any]]], num_batches: int
) -> List[Tensor]:
    """The first batches of a data loader as the backbone sees them.

    Args:
        model: detector, whose statistics and padding are used.
        loader: batches as for training, Detectron2's lists of dicts.
        num_batches: how many.

    Returns:
        tensors (N,3,H,W), normalised and padded.
    """
    return [
        model.preprocess_image(batch).tensor.clone()
        for batch in itertools.islice(loader, num_batches)
    ]
