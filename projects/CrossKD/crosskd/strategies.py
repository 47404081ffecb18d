"""Which feature passes through which head, and what is compared with what (Fig. 6)."""

from dataclasses import dataclass
from typing import Dict

__all__ = ["STRATEGIES", "Strategy"]


@dataclass(frozen=True)
class Strategy:
    """One of Fig. 6.

    Attributes:
        moved: side whose feature passes through the other side's head, giving the cross
            prediction: "student" or "teacher".
        prediction: what receives the gradient: "cross" or "student".
        target: what it is compared with: "teacher" or "cross".
    """

    moved: str
    prediction: str
    target: str


STRATEGIES: Dict[str, Strategy] = {
    "a": Strategy("student", "cross", "teacher"),
    "b": Strategy("teacher", "student", "cross"),
    "c": Strategy("student", "student", "cross"),
    "d": Strategy("teacher", "cross", "teacher"),
}
