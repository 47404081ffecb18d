"""What of the overlaps between detections and ground truth every threshold needs, found once."""

from typing import Callable, Iterable, NamedTuple

import numpy as np
from pycocotools import mask

from .inputs import Boxes, Detections, GroundTruth

__all__ = ["Overlaps", "find_overlaps"]


class Overlaps(NamedTuple):
    """Overlaps of n detections, in their order.

    Attributes:
        same: (n,) largest IoU with an object of the detection's class; 0: there is none.
        same_object: (n,) that object, an index into ``GroundTruth.objects``; -1: none.
        other: (n,) the same for objects of all other classes.
        other_object: (n,).
        crowd: (n,) largest part of the detection that lies in one crowd region of its class.
        pairs: (m, 2) every detection and object of its class with an IoU of at least
            ``least``: by detection, and of one detection the largest IoU first, of equal ones
            the object that comes last (as COCOeval prefers it).
        pair_iou: (m,) IoU of the pairs.
    """

    same: np.ndarray
    same_object: np.ndarray
    other: np.ndarray
    other_object: np.ndarray
    crowd: np.ndarray
    pairs: np.ndarray
    pair_iou: np.ndarray


def find_overlaps(
    detections: Detections,
    truth: GroundTruth,
    least: float,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Overlaps:
    """Overlaps of all detections with the ground truth of their images.

    Args:
        detections: any number.
        truth: objects and crowd regions.
        least: smallest IoU of a pair.
        progress: wraps the loop over the images that have detections, e.g. in a bar.
    """
    n = len(detections.score)
    same, other, crowd = np.zeros(n), np.zeros(n), np.zeros(n)
    same_object, other_object = np.full(n, -1), np.full(n, -1)
    pairs, pair_iou = [np.empty((0, 2), dtype=np.int64)], [np.empty(0)]
    found, objects, crowds = (
        _by_image(boxes.image) for boxes in (detections, truth.objects, truth.crowds)
    )
    for image in progress(np.unique(detections.image).tolist()):
        d, g, c = found(image), objects(image), crowds(image)
        if len(g):
            iou = _iou(detections, d, truth.objects, g, False)
            equal = detections.category[d][:, None] == truth.objects.category[g][None]
            same[d], same_object[d] = _best(np.where(equal, iou, 0), g)
            other[d], other_object[d] = _best(np.where(equal, 0, iou), g)
            rows, columns = np.nonzero(equal & (iou >= least))
            pairs.append(np.stack([d[rows], g[columns]], axis=1))
            pair_iou.append(iou[rows, columns])
        if len(c):
            part = _iou(detections, d, truth.crowds, c, True)
            equal = detections.category[d][:, None] == truth.crowds.category[c][None]
            crowd[d] = np.where(equal, part, 0).max(axis=1)
    all_pairs, all_iou = np.concatenate(pairs), np.concatenate(pair_iou)
    order = np.lexsort((-all_pairs[:, 1], -all_iou, all_pairs[:, 0]))
    return Overlaps(same, same_object, other, other_object, crowd, all_pairs[order], all_iou[order])


def _iou(detections: Detections, d, boxes: Boxes, b, crowd: bool) -> np.ndarray:
    """IoU, or with ``crowd`` the part of the detection that is inside, (len(d), len(b))."""
    return mask.iou(detections.xywh[d], boxes.xywh[b], [crowd] * len(b))


def _best(iou: np.ndarray, g: np.ndarray):
    """Largest value of each row and its object; -1 if it is 0."""
    best = iou.max(axis=1)
    return best, np.where(best > 0, g[iou.argmax(axis=1)], -1)


def _by_image(image: np.ndarray) -> Callable[[int], np.ndarray]:
    """A function that returns the ascending indices of the entries of an image."""
    order = np.argsort(image, kind="stable")
    ordered = image[order]

    def indices(which: int) -> np.ndarray:
        first, last = np.searchsorted(ordered, [which, which + 1])
        return order[first:last]

    return indices
