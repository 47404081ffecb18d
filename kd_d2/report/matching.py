"""Which detections of an image are right, and which objects they found."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

__all__ = ["Box", "Found", "match", "paired_iou"]

MATCH_IOU = 0.5


class Box(NamedTuple):
    """A box of a class, in pixels of the original image.

    Attributes:
        xyxy: left, top, right, bottom.
        label: contiguous class index.
        score: of a detection; 1 for ground truth.
        crowd: ground truth that stands for several objects.
    """

    xyxy: Tuple[float, float, float, float]
    label: int
    score: float = 1.0
    crowd: bool = False


class Found(NamedTuple):
    """What detections of an image are worth.

    Attributes:
        right: for every detection, "right", "wrong", or "crowd" (inside of a crowd region, which
            counts as neither).
        by: for every object, the score of the detection that found it; None: nothing did.
    """

    right: List[str]
    by: List[Optional[float]]


def match(detections: Sequence[Box], truth: Sequence[Box], iou: float = MATCH_IOU) -> Found:
    """Give every object to one detection, as COCO's evaluation does at one threshold.

    In the order of their scores, detections take the free object of their class that they overlap
    most; the outcome above any score does not depend on detections below it.

    Args:
        iou: overlap that is needed.
    """
    overlaps = paired_iou([d.xyxy for d in detections], [t.xyxy for t in truth])
    right = ["wrong"] * len(detections)
    by: List[Optional[float]] = [None] * len(truth)
    for i in sorted(range(len(detections)), key=lambda i: -detections[i].score):
        same = [j for j, t in enumerate(truth) if t.label == detections[i].label]
        free = [j for j in same if not truth[j].crowd and by[j] is None and overlaps[i, j] >= iou]
        if free:
            best = max(free, key=lambda j: overlaps[i, j])
            by[best], right[i] = detections[i].score, "right"
        elif any(
            truth[j].crowd and _inside(detections[i].xyxy, truth[j].xyxy) >= iou for j in same
        ):
            right[i] = "crowd"
    return Found(right, by)


def paired_iou(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> np.ndarray:
    """Intersection over union of XYXY boxes, (len(first), len(second)); 0 for empty boxes."""
    a = np.asarray(first, dtype=float).reshape(-1, 1, 4)
    b = np.asarray(second, dtype=float).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inter = sides.clip(min=0).prod(axis=-1)
    union = _area(a) + _area(b) - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).clip(min=0).prod(axis=-1)


def _inside(box: Sequence[float], region: Sequence[float]) -> float:
    """Part of a box that lies in a region."""
    x0, y0, x1, y1 = (
        np.maximum(box[:2], region[:2]).tolist() + np.minimum(box[2:], region[2:]).tolist()
    )
    area = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
    return max(x1 - x0, 0) * max(y1 - y0, 0) / area if area > 0 else 0.0
