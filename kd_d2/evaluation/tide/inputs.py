"""Ground truth and predictions in COCO's format as arrays, checked."""

from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np
from pycocotools.coco import COCO

__all__ = ["Boxes", "Detections", "GroundTruth", "read_detections", "read_ground_truth"]


class Boxes(NamedTuple):
    """n annotated boxes.

    Attributes:
        image: (n,) index into ``GroundTruth.image_ids``.
        category: (n,) index into ``GroundTruth.category_ids``.
        xywh: (n, 4) left, top, width and height, pixels, float64.
    """

    image: np.ndarray
    category: np.ndarray
    xywh: np.ndarray


class GroundTruth(NamedTuple):
    """What should be found, objects and crowd regions apart, each sorted by annotation id."""

    image_ids: List[Any]
    category_ids: List[Any]
    objects: Boxes
    crowds: Boxes


class Detections(NamedTuple):
    """n detections, the highest score first; fields as those of :class:`Boxes`, and (n,) scores."""

    image: np.ndarray
    category: np.ndarray
    xywh: np.ndarray
    score: np.ndarray


def read_ground_truth(
    gt: Union[COCO, Mapping[str, Any]], image_ids: Optional[Iterable[Any]] = None
) -> GroundTruth:
    """The annotations of some images.

    Args:
        gt: data set in COCO's format. Only ids and boxes are read: "images" (id), "categories"
            (id), "annotations" (id, image_id, category_id, bbox and, if there, iscrowd).
        image_ids: images that count; default: all.

    Raises:
        ValueError: a list or an entry's key is missing, an annotation has a category or
            ``image_ids`` an image that the data set does not list, or a box is not four numbers.
    """
    dataset = gt.dataset if isinstance(gt, COCO) else gt
    for name in ("images", "categories", "annotations"):
        if not isinstance(dataset, Mapping) or not isinstance(dataset.get(name), list):
            raise ValueError(
                f"the ground truth has no list '{name}', so it is not in COCO's format"
            )
    listed = _column(dataset["images"], "id", "image")
    chosen = set(listed) if image_ids is None else set(image_ids)
    _refuse_unknown(chosen, set(listed), "image_ids", "images of the ground truth")
    images = _positions(chosen)
    categories = _positions(_column(dataset["categories"], "id", "category"))
    annotations = [
        annotation
        for annotation, image in zip(
            dataset["annotations"], _column(dataset["annotations"], "image_id", "annotation")
        )
        if image in images
    ]
    _refuse_unknown(
        _column(annotations, "category_id", "annotation"),
        categories,
        "annotations of the ground truth, category_id",
        "its categories",
    )
    annotations = sorted(annotations, key=lambda a: _value(a, "id", "annotation"))
    is_crowd = [bool(a.get("iscrowd", 0)) for a in annotations]
    objects = [a for a, crowd in zip(annotations, is_crowd) if not crowd]
    crowds = [a for a, crowd in zip(annotations, is_crowd) if crowd]
    return GroundTruth(
        list(images),
        list(categories),
        _boxes(objects, images, categories, "annotation"),
        _boxes(crowds, images, categories, "annotation"),
    )


def read_detections(
    predictions: Sequence[Mapping[str, Any]],
    gt: Union[COCO, Mapping[str, Any]],
    truth: GroundTruth,
    max_per_image: int,
) -> Detections:
    """The best detections of every image in an order that does not depend on that of the file.

    Equal scores are ordered by image, as COCOeval does, then by box and category.

    Args:
        predictions: COCO's result format: image_id, category_id, bbox (XYWH) and score each.
        gt: the data set; tells images that are left out from images that it does not have.
        truth: what was read from it.
        max_per_image: so many of the highest scores are kept, over all classes together.

    Raises:
        ValueError: there are no predictions, one lacks a key, is of an image or a category that
            the data set does not list, or has a score or box that is not finite.
    """
    if not len(predictions):
        raise ValueError("there are no predictions")
    dataset = gt.dataset if isinstance(gt, COCO) else gt
    of_image = _column(predictions, "image_id", "prediction")
    known = set(_column(dataset["images"], "id", "image"))
    _refuse_unknown(of_image, known, "predictions, image_id", "images of the ground truth")
    images, categories = _positions(truth.image_ids), _positions(truth.category_ids)
    predictions = [p for p, image in zip(predictions, of_image) if image in images]
    _refuse_unknown(
        _column(predictions, "category_id", "prediction"),
        categories,
        "predictions, category_id",
        "categories of the ground truth",
    )
    boxes = _boxes(predictions, images, categories, "prediction")
    scores = _numbers(predictions, "score", "prediction", ())
    order = np.lexsort((boxes.category, *boxes.xywh.T[::-1], boxes.image, -scores))
    order = order[_rank_within(boxes.image[order]) < max_per_image]
    return Detections(*(field[order] for field in boxes), scores[order])


def _rank_within(groups: np.ndarray) -> np.ndarray:
    """How many earlier entries have the same value, for every entry."""
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], groups[order])
    rank = np.empty(len(groups), dtype=np.int64)
    rank[order] = np.arange(len(groups)) - starts
    return rank


def _boxes(entries, images: Dict, categories: Dict, label: str) -> Boxes:
    return Boxes(
        np.array([images[e["image_id"]] for e in entries], dtype=np.int64),
        np.array([categories[e["category_id"]] for e in entries], dtype=np.int64),
        _numbers(entries, "bbox", label, (4,)),
    )


def _numbers(entries, key: str, label: str, shape: tuple) -> np.ndarray:
    """(n, *shape) float64."""
    values = _column(entries, key, label)
    try:
        result = np.array(values, dtype=np.float64).reshape(len(values), *shape)
        if np.isfinite(result).all():
            return result
    except (TypeError, ValueError):
        pass  # the loop finds the entry
    for entry, value in zip(entries, values):
        if not _is_finite(value, shape):
            wanted = "four finite numbers" if shape else "a finite number"
            raise ValueError(f"{label} {dict(entry)} has the {key} {value!r} instead of {wanted}")
    raise AssertionError("every single value is right")


def _is_finite(value, shape: tuple) -> bool:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    return array.shape == shape and bool(np.isfinite(array).all())


def _positions(ids: Iterable[Any]) -> Dict[Any, int]:
    """Sorted id -> its index."""
    return {id_: i for i, id_ in enumerate(sorted(ids))}


def _column(entries, key: str, label: str) -> List[Any]:
    return [_value(entry, key, label) for entry in entries]


def _value(entry, key: str, label: str):
    try:
        return entry[key]
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{label} {entry} has no '{key}', so it is not in COCO's format") from None


def _refuse_unknown(used: Iterable[Any], known, what: str, where: str) -> None:
    unknown = list(dict.fromkeys(id_ for id_ in used if id_ not in known))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        some = ", ".join(map(repr, unknown[:3]))
        raise ValueError(
            f"{what}: {some}{more} not among the {len(known)} {where} "
            f"({', '.join(map(repr, list(known)[:3]))}, ...); are both of the same data set?"
        )
