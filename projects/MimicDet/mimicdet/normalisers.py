"""Numbers that the refinement module's losses can be divided by; all are ours, the paper is silent.

A plain mean makes a positive weigh next to nothing among some 20000 anchors. Dividing by the number
of positives lets the classification loss explode early on, when one positive stands against all
negatives; for the regression loss, a sum over positives, it is the natural choice.
"""

from operator import attrgetter
from typing import Callable, Dict, NamedTuple, Union

from torch import Tensor

__all__ = ["CLS_NORMS", "Counts", "REG_NORMS"]


class Counts(NamedTuple):
    """What is counted in a batch."""

    fixed: int
    """``MODEL.RPN.BATCH_SIZE_PER_IMAGE`` (256) per image, as in Detectron2's RPN."""
    anchors: int
    """Anchors of all images."""
    positives: Tensor
    """Positives of all images, the mean over processes, at least 1."""


Norm = Callable[[Counts], Union[int, Tensor]]

CLS_NORMS: Dict[str, Norm] = {
    "fixed": attrgetter("fixed"),
    "num_pos": attrgetter("positives"),
    "mean": attrgetter("anchors"),
}
"""Values of ``MODEL.MIMICDET.REFINE.CLS_NORM``."""

REG_NORMS: Dict[str, Norm] = {name: CLS_NORMS[name] for name in ("fixed", "num_pos")}
"""Values of ``MODEL.MIMICDET.REFINE.REG_NORM``."""
