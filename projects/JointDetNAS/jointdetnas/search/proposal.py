"""What a trial evaluates, and what came out of one."""

from dataclasses import asdict, dataclass
from typing import Any, Dict, Mapping, Optional

from ..actions import Action
from ..space import Architecture

__all__ = ["BASE", "NOTHING", "POOL", "TEACHER", "Outcome", "Proposal"]

# Names of what changes besides the student's actions.
BASE, TEACHER, NOTHING, POOL = "Base", "Teacher", "Nothing", "Pool"


@dataclass(frozen=True)
class Outcome:
    """Result of a complete trial, as far as proposals depend on it.

    Args:
        number: of the trial.
        score: H.
        architecture: of its student, with the ages of its blocks after the evaluation.
        teacher: code of its teacher.
    """

    number: int
    score: float
    architecture: Architecture
    teacher: str


@dataclass(frozen=True)
class Proposal:
    """One pair of a student and a teacher to evaluate.

    Args:
        number: of the trial.
        change: what differs from the parent: name of a student action, "Teacher", "Nothing" (the
            training goes on), or "Base" and "Pool", which have no parent.
        parent: trial whose trained student it starts from; None: there is none.
        action: of the student, if that changes.
        teacher: code of a subnet, or ``KD.TEACHER.ELASTIC.SUBNET`` as it is in the config.
    """

    number: int
    change: str
    parent: Optional[int]
    action: Optional[Action]
    teacher: str

    def to_dict(self) -> Dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Proposal":
        action = values["action"] and Action.from_dict(values["action"])
        return cls(**{**values, "action": action})

    def __str__(self) -> str:
        if self.parent is None:
            return f"{self.change} {self.teacher}".strip()
        what = str(self.action) if self.action else f"{self.change} {self.teacher}".strip()
        return f"{what}, from trial {self.parent}"
