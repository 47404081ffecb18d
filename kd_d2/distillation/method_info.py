"""What a person wants to know of a method before choosing it."""

from dataclasses import dataclass
from typing import Tuple

__all__ = ["MethodInfo"]


@dataclass(frozen=True)
class MethodInfo:
    """Facts about a distillation method; printed by ``tools/list_methods.py``.

    Attributes:
        title: full name of the method.
        paper: authors, venue and year, and an address where known.
        compares: what of student and teacher, in a few words.
        requires: what the pair must have, e.g. "equal channels", "ground truth", "anchors".
        gains: published results, "pair: base -> distilled (source)"; never ours.
        unverified: what of the implementation could not be checked against the authors' code.
    """

    title: str
    paper: str
    compares: str
    requires: Tuple[str, ...] = ()
    gains: Tuple[str, ...] = ()
    unverified: str = ""
