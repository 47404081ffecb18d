"""True positives and the types of all errors at one IoU threshold.

TIDE, "A General Toolbox for Identifying Object Detection Errors" (Bolya et al., ECCV 2020,
arXiv 2008.08115), sections 2.2 and 2.3.
"""

from typing import NamedTuple

import numpy as np

from .average_precision import mean_average_precision
from .inputs import Detections, GroundTruth
from .overlaps import Overlaps

__all__ = ["ERROR_TYPES", "Judgement", "fixed_ap", "judge"]

# Wrong class, bad box, both at once, a second detection of a found object, background, and objects
# that nothing found.
ERROR_TYPES = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
_CLS, _LOC, _BOTH, _DUPE, _BKG, _ = range(6)
_RIGHT = -1


class Judgement(NamedTuple):
    """What n detections of G objects are at one threshold.

    Attributes:
        kind: (n,) index into ERROR_TYPES; -1: a true positive.
        ignored: (n,) bool: inside a crowd region; has a type, but does not count for AP.
        repaired: (n,) the object that the detection becomes a true positive of once its "Cls" or
            "Loc" error is mended; -1: it is removed instead.
        missed: (G,) bool, objects without a true positive and without a "Cls" or "Loc" error.
    """

    kind: np.ndarray
    ignored: np.ndarray
    repaired: np.ndarray
    missed: np.ndarray

    def count(self, name: str) -> int:
        """Number of errors of a type."""
        if name == "Miss":
            return int(self.missed.sum())
        return int((self.kind == ERROR_TYPES.index(name)).sum())


def judge(overlaps: Overlaps, num_objects: int, threshold: float, background: float) -> Judgement:
    """Match detections to objects, and name what is wrong with those that match none.

    Greedily by descending score, each detection takes the free object of its class with the
    largest IoU of at least ``threshold``, as in COCOeval.

    Args:
        overlaps: of detections sorted by descending score.
        num_objects: G.
        threshold: IoU that makes a true positive.
        background: IoU up to which a detection has nothing to do with an object.
    """
    matched, used = _match(overlaps, num_objects, threshold)
    wrong = matched < 0
    same, other = overlaps.same, overlaps.other
    kind = np.select(
        [
            ~wrong,
            (background <= same) & (same <= threshold),
            other >= threshold,
            # Unmatched with that IoU: whatever it fits has a true positive already.
            same >= threshold,
            np.maximum(same, other) <= background,
        ],
        [_RIGHT, _LOC, _CLS, _DUPE, _BKG],
        default=_BOTH,
    )
    claimed = np.select(
        [kind == _LOC, kind == _CLS], [overlaps.same_object, overlaps.other_object], default=-1
    )
    claims = np.flatnonzero(claimed >= 0)
    objects, first = np.unique(claimed[claims], return_index=True)
    missed = ~used
    missed[objects] = False
    repaired = np.full(len(kind), -1)
    free = ~used[objects]
    repaired[claims[first[free]]] = objects[free]
    return Judgement(kind, wrong & (overlaps.crowd >= threshold), repaired, missed)


def _match(overlaps: Overlaps, num_objects: int, threshold: float):
    """(n,) object of each true positive, else -1; (G,) bool, objects that have one."""
    matched = np.full(len(overlaps.same), -1)
    used = np.zeros(num_objects, dtype=bool)
    for detection, obj in overlaps.pairs[overlaps.pair_iou >= threshold].tolist():
        if matched[detection] < 0 and not used[obj]:
            matched[detection] = obj
            used[obj] = True
    return matched, used


def fixed_ap(
    judgement: Judgement, detections: Detections, truth: GroundTruth, name: str = ""
) -> float:
    """AP (percent) at the judgement's threshold with all errors of a type mended.

    "Cls" and "Loc": of the detections that point at an object without a true positive, the one
    with the highest score becomes it, the others are removed. "Both", "Dupe" and "Bkg" are
    removed. "Miss": the missed objects do not count.

    Args:
        name: one of ERROR_TYPES; empty: AP as it is.
    """
    kind, ignored, repaired, missed = judgement
    objects = truth.objects.category
    right, keep, category = kind == _RIGHT, ~ignored, detections.category
    if name == "Miss":
        objects = objects[~missed]
    elif name:
        mended = kind == ERROR_TYPES.index(name)
        won = mended & (repaired >= 0)
        right = right | won
        keep = (keep & ~mended) | won
        category = category.copy()
        category[won] = objects[repaired[won]]
    counts = np.bincount(objects, minlength=len(truth.category_ids))
    return mean_average_precision(category[keep], right[keep], counts)
