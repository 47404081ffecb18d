"""Student actions: the interface of f_evolve, and what is common to all of them."""

from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Mapping, Sequence

from detectron2.utils.registry import Registry
from torch import Tensor, nn

from .space import Architecture

__all__ = ["STUDENT_ACTIONS", "Action", "StudentAction"]

STUDENT_ACTIONS = Registry("STUDENT_ACTIONS")
STUDENT_ACTIONS.__doc__ = """
Classes of actions, named in SEARCH.STUDENT_ACTIONS and called as ``Name(cfg, root)``, where root is
the architecture of the base detector.
"""


@dataclass(frozen=True)
class Action:
    """One action with its arguments.

    Args:
        name: key of ``STUDENT_ACTIONS``.
        stage: stage it concerns, from 0; -1: the action chooses by itself.
        direction: "right" (towards the coarser stages) or "left", of a moved block; else empty.
    """

    name: str
    stage: int = -1
    direction: str = ""

    def to_dict(self) -> Dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Action":
        return cls(**values)

    def __str__(self) -> str:
        stage = f" stage {self.stage + 1}" if self.stage >= 0 else ""
        return f"{self.name}{stage}{f' {self.direction}' if self.direction else ''}"


class StudentAction:
    """A kind of change to a student's backbone, with inherited weights (appendix A.1.2)."""

    name: str = ""

    def choices(self, architecture: Architecture) -> List[Action]:
        """The legal actions of this kind, in a fixed order; needs no weights.

        An action that would change nothing is not legal.
        """
        raise NotImplementedError

    def apply(self, model: nn.Module, action: Action, images: Sequence[Tensor] = ()) -> nn.Module:
        """Return a new model; ``model`` is left as it is.

        Args:
            model: detector with a MorphResNet.
            action: one of :meth:`choices`.
            images: normalised and padded batches (N,3,H,W) to measure features on, for actions that
                have ``needs_images``.
        """
        raise NotImplementedError

    def needs_images(self, architecture: Architecture, action: Action) -> bool:
        """True if :meth:`apply` measures features on images."""
        return False
