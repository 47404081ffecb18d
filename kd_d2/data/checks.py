"""What is wrong with a data set, in one sentence, before or after Detectron2 stumbles on it."""

import difflib
import json
import logging
import math
import os
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

__all__ = [
    "absent_files",
    "check_datasets",
    "dataset_classes",
    "drop_unusable_annotations",
    "explain_coco_json",
    "missing_files",
]

logger = logging.getLogger(__name__)


def check_datasets(cfg, train: bool = True) -> None:
    """Check every data set of DATASETS.TRAIN and DATASETS.TEST before anything is built.

    Files are looked for, not read: what is in them is checked when a loader is built.

    Args:
        cfg: whole config.
        train: False looks at DATASETS.TEST only, for evaluation.

    Raises:
        ValueError: if a name is not registered; the message lists the nearest known ones.
        FileNotFoundError: if files are missing: which, where, and how to get them.
    """
    for key in ("TRAIN", "TEST") if train else ("TEST",):
        for name in cfg.DATASETS[key]:
            _check_name(f"DATASETS.{key}", name)
            problem = missing_files(name)
            if problem:
                raise FileNotFoundError(problem)


def dataset_classes(name: str) -> List[str]:
    """The class names of a registered data set, in the order of its contiguous category ids.

    Raises:
        ValueError: if the name is unknown or has no classes, even after it was loaded.
    """
    _check_name("The data set", name)
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)  # data sets in COCO's format learn their classes from the file
    classes = metadata.get("thing_classes")
    if classes is None:
        raise ValueError(
            f"The data set {name} has no class names; set MetadataCatalog.get({name!r})"
            ".thing_classes where it is registered."
        )
    return list(classes)


def absent_files(name: str) -> List[str]:
    """The files and folders of a registered data set that do not exist, as they are registered."""
    metadata = MetadataCatalog.get(name)
    required = metadata.get("required_files")
    if required is None:  # registered by someone else
        required = [metadata.get(key) for key in ("json_file", "image_root", "dirname")]
    return [path for path in required if path and not os.path.exists(path)]


def missing_files(name: str) -> Optional[str]:
    """A sentence about the files that a registered data set lacks, or None if all are there."""
    metadata = MetadataCatalog.get(name)
    absent = absent_files(name)
    if not absent:
        return None
    where = f"the data set {name} was looked for in {os.path.abspath(absent[0])}"
    if len(absent) > 1:
        where += f" and {len(absent) - 1} more place{'s' if len(absent) > 2 else ''}"
    source = metadata.get("source")
    help_ = f"; to get it, {source}" if source else ""
    return (
        f"{where[0].upper()}{where[1:]}, which does not exist{help_}, and set the environment "
        "variable DETECTRON2_DATASETS to the folder that contains it."
    )


def explain_coco_json(json_file: str, classes: Optional[Sequence[str]] = None) -> Optional[str]:
    """The first problem of an annotation file in COCO's format, or None if none is found.

    Args:
        json_file: path of the file.
        classes: class names that the file should have, sorted by category id.
    """
    try:
        with open(json_file, "rb") as file:
            content = json.load(file)
    except ValueError as error:
        return f"{json_file} is not a complete JSON file ({error}); write or download it again."
    for key in ("images", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            return f"{json_file} has no list {key!r}, so it is not in COCO's format."
    categories = {c["id"]: c["name"] for c in content["categories"] if {"id", "name"} <= set(c)}
    if not categories:
        return f"{json_file} has no category in 'categories'; list the classes there."
    names = [categories[id_] for id_ in sorted(categories)]
    if classes is not None and names != list(classes):
        return (
            f"{json_file} has the classes {_shorten(names)} but the data set was registered with "
            f"{_shorten(classes)}; use a matching file or another name for the data set."
        )
    for image in content["images"]:
        for key in ("id", "file_name", "height", "width"):
            if key not in image:
                return f"{json_file}: image {image.get('id', image)} has no {key!r}."
    seen = set()
    for annotation in content.get("annotations", ()):
        label = f"{json_file}: annotation {annotation.get('id', annotation)}"
        for key in ("id", "image_id", "category_id", "bbox"):
            if key not in annotation:
                return f"{label} has no {key!r}."
        if annotation["category_id"] not in categories:
            return (
                f"{label} has the category {annotation['category_id']}, which is not among the "
                f"'categories' of the file ({_shorten(sorted(categories))}); correct the "
                "annotation or list the category."
            )
        if len(annotation["bbox"]) != 4:
            return f"{label} has the bbox {annotation['bbox']} instead of four numbers."
        if annotation["id"] in seen:
            return f"{label} is there twice; annotation ids have to be unique."
        seen.add(annotation["id"])
    return None


def drop_unusable_annotations(
    dicts: List[Dict[str, Any]], name: str = "the data set"
) -> List[Dict[str, Any]]:
    """The same images without annotations whose box is empty, not finite, outside or missing.

    Boxes that reach over the border are kept: the mapper clips them. Images stay even if they
    lose their last annotation. What was dropped is counted in one warning.

    Args:
        dicts: images in Detectron2's dataset format; not modified.
        name: of the data set, for the messages.

    Raises:
        ValueError: if there are no images, or if there were annotations and none is usable.
    """
    if not dicts:
        raise ValueError(f"There are no images in {name}; check its annotation file.")
    dropped: Counter = Counter()
    example = ""
    kept_any = False
    result = []
    for record in dicts:
        annotations = record.get("annotations")
        if not annotations:
            result.append(record)
            continue
        kept = []
        for annotation in annotations:
            reason = _why_unusable(annotation, record.get("width"), record.get("height"))
            if reason is None:
                kept.append(annotation)
            else:
                dropped[reason] += 1
                example = example or f"{annotation.get('bbox')} of {record.get('file_name')}"
        kept_any = kept_any or bool(kept)
        result.append(record if len(kept) == len(annotations) else {**record, "annotations": kept})
    if dropped:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        logger.warning("Dropped boxes of %s: %s; the first is %s.", name, listed, example)
    if dropped and not kept_any:
        raise ValueError(
            f"None of the {sum(dropped.values())} boxes of {name} is usable ({listed}); the first "
            f"is {example}."
        )
    return result


def _why_unusable(
    annotation: Dict[str, Any], width: Optional[int], height: Optional[int]
) -> Optional[str]:
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if box is None:
        return "missing"
    if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        return None  # rotated boxes are for the mapper to judge
    x0, y0, x1, y1 = (float(v) for v in box)
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        return "not finite"
    if mode == BoxMode.XYWH_ABS:
        x1, y1 = x0 + x1, y0 + y1
    if x1 <= x0 or y1 <= y0:
        return "without area"
    if x1 <= 0 or y1 <= 0 or (width and x0 >= width) or (height and y0 >= height):
        return "outside the image"
    return None


def _check_name(key: str, name: str) -> None:
    if name in DatasetCatalog:
        return
    known = sorted(DatasetCatalog.list())
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known
    raise ValueError(
        f"{key} has the unknown name {name!r}; the nearest known ones are {', '.join(near)}."
    )


def _shorten(values: Sequence[Any], most: int = 12) -> str:
    text = ", ".join(str(value) for value in list(values)[:most])
    return text + (f", ... ({len(values)} in all)" if len(values) > most else "")
