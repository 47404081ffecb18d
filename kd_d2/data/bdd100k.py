"""BDD100K detection in Detectron2's dataset format."""

import json
import logging
import os
from collections import Counter
from typing import Any, Dict, List, Sequence

from detectron2.structures import BoxMode

__all__ = ["BDD100K_CLASSES", "load_bdd100k_json"]

logger = logging.getLogger(__name__)

BDD100K_CLASSES = (
    "pedestrian",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
    "traffic light",
    "traffic sign",
)

# Names in the labels of 2018 -> those in the labels of 2020 ("det_20").
_ALIASES = {"person": "pedestrian", "motor": "motorcycle", "bike": "bicycle"}

# All images of the set have this size; the label files do not repeat it.
_HEIGHT, _WIDTH = 720, 1280


def load_bdd100k_json(
    json_file: str, image_root: str, class_names: Sequence[str] = BDD100K_CLASSES
) -> List[Dict[str, Any]]:
    """Images and boxes of a BDD100K label file.

    The file has a list of frames (or a dictionary with the list under "frames"), each with a
    "name" and "labels" of a "category" and a "box2d" x1, y1, x2, y2. The corners are inclusive:
    as in the authors' own conversion to COCO (scalabel's ``box2d_to_bbox``, which their published
    results go through) a box reaches one pixel beyond its x2 and y2. Labels of 2018, with the
    categories person, motor and bike, are read as well.

    Args:
        json_file: path of det_train.json or det_val.json (2020), or of
            bdd100k_labels_images_train.json or bdd100k_labels_images_val.json (2018).
        image_root: folder of the split's images.
        class_names: categories to keep, in order; labels of others ("other vehicle", "trailer")
            and labels without a box are left out, and counted in one log line.

    Returns:
        one dictionary per frame, boxes as XYXY in absolute pixels; frames without a label stay.

    Raises:
        ValueError: if the file is not of this format.
    """
    with open(json_file) as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{json_file} is not a JSON file ({error}).") from error
    frames = content.get("frames") if isinstance(content, dict) else content
    if not isinstance(frames, list):
        raise ValueError(
            f"{json_file} is not a label file of BDD100K: it should have a list of frames; use "
            "the files det_train.json and det_val.json of the 2020 labels (det_20)."
        )
    skipped: Counter = Counter()
    dicts = []
    for number, frame in enumerate(frames):
        try:
            dicts.append(_record(frame, image_root, list(class_names), skipped))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{json_file}: frame {number} is not as in BDD100K ({type(error).__name__}: "
                f"{error}); mend or remove it."
            ) from error
    if skipped:
        listed = ", ".join(f"{count} of {name!r}" for name, count in sorted(skipped.items()))
        logger.info("Left out labels of %s: %s.", json_file, listed)
    return dicts


def _record(
    frame: Dict[str, Any], image_root: str, class_names: List[str], skipped: Counter
) -> Dict[str, Any]:
    """Detectron2's dictionary of one frame; counts the categories of left out labels."""
    annotations = []
    for label in frame.get("labels") or ():
        box, name = label.get("box2d"), label["category"]
        name = name if name in class_names else _ALIASES.get(name, name)
        if box is None or name not in class_names:
            skipped[label["category"]] += 1
            continue
        annotations.append(
            {
                "bbox": [box["x1"], box["y1"], box["x2"] + 1, box["y2"] + 1],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": class_names.index(name),
                "iscrowd": int(bool((label.get("attributes") or {}).get("crowd", False))),
            }
        )
    return {
        "file_name": os.path.join(image_root, frame["name"]),
        "image_id": os.path.splitext(frame["name"])[0],
        "height": _HEIGHT,
        "width": _WIDTH,
        "annotations": annotations,
    }
