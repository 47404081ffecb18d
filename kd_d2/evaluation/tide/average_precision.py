"""COCO's average precision at a single IoU, from detections that are already judged."""

import numpy as np

__all__ = ["average_precision", "mean_average_precision"]

_RECALLS = np.linspace(0, 1, 101)


def average_precision(right: np.ndarray, num_objects: int) -> float:
    """Precision at 101 recalls, averaged, in [0, 1].

    Args:
        right: (n,) bool, the detections of a class by descending score; True: a true positive.
        num_objects: number of objects of the class; at least the number of true positives. 0
            gives 0.
    """
    if not num_objects or not right.any():
        return 0.0
    found = np.cumsum(right)
    precision = found / np.arange(1, len(right) + 1)
    # the best precision at this recall or a higher one
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(found / num_objects, _RECALLS)
    return float(np.append(precision, 0.0)[np.minimum(index, len(right))].mean())


def mean_average_precision(
    category: np.ndarray, right: np.ndarray, num_objects: np.ndarray
) -> float:
    """Mean over the classes that have objects or detections, in percent; 0 if none has.

    COCOeval leaves out classes with detections but without objects; they count as 0 here.

    Args:
        category: (n,) classes of the detections, by descending score.
        right: (n,) bool.
        num_objects: (C,) objects of every class.
    """
    counts = np.bincount(category, minlength=len(num_objects))
    order = np.argsort(category, kind="stable")
    judged = np.split(right[order], np.cumsum(counts)[:-1])
    values = [average_precision(r, int(n)) for r, n in zip(judged, num_objects) if n > 0 or len(r)]
    return 100 * float(np.mean(values)) if values else 0.0
