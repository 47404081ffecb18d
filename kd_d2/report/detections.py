"""The same images with the detections of every run, from stored predictions or a checkpoint."""

import base64
import io
import logging
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

import torch
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode
from PIL import Image

from kd_d2.checkpoint import load_weights
from kd_d2.data import NamingMapper, build_mapper, choose_indices
from kd_d2.engine.trainer import KDTrainer

from .matching import Box
from .run import Run
from .truth import TestData, read_predictions

__all__ = ["Picture", "chosen_pictures", "detect", "stored_detections", "truth_boxes"]

logger = logging.getLogger(__name__)

# weaker detections, and more of them in an image, are not on the page
MIN_SCORE = 0.05
MAX_BOXES = 60
# longer side of the pictures, pixels
PICTURE_SIDE = 560


class Picture(NamedTuple):
    """An image of the test data.

    Attributes:
        record: Detectron2's dictionary.
        width, height: of the original image, to which all boxes refer.
        data: address that holds a reduced copy, a JPEG.
        truth: annotated boxes.
    """

    record: Mapping[str, Any]
    width: int
    height: int
    data: str
    truth: List[Box]


def chosen_pictures(data: TestData, count: int) -> List[Picture]:
    """Evenly spaced images among those with annotations; among all if there are none.

    Raises:
        OSError: an image cannot be read.
    """
    records = [r for r in data.records if r.get("annotations")] or data.records
    return [_picture(records[i]) for i in choose_indices(len(records), "", count)]


def _picture(record: Mapping[str, Any]) -> Picture:
    image = Image.fromarray(read_image(record["file_name"], format="RGB"))
    width, height = image.size
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    data = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return Picture(record, width, height, data, truth_boxes(record))


def truth_boxes(record: Mapping[str, Any]) -> List[Box]:
    """The annotations of a record."""
    return [
        Box(
            tuple(float(v) for v in BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)),
            a["category_id"],
            crowd=bool(a.get("iscrowd", 0)),
        )
        for a in record.get("annotations") or ()
    ]


def stored_detections(
    run: Run, data: TestData, pictures: Sequence[Picture]
) -> Optional[List[List[Box]]]:
    """Detections of every picture that a run's evaluation stored; None if it stored none.

    Raises:
        ValueError: the file is broken, or of other images or classes.
    """
    try:
        predictions = read_predictions(run)
    except FileNotFoundError:
        return None
    labels = {id_: index for index, id_ in data.category_ids.items()}
    wanted: Dict[Any, List[Box]] = {p.record["image_id"]: [] for p in pictures}
    known = {record["image_id"] for record in data.records}
    for entry in predictions:
        if entry["image_id"] not in known or entry["category_id"] not in labels:
            raise ValueError(
                f"the stored predictions have image {entry['image_id']!r} and category "
                f"{entry['category_id']!r}, which {data.name} does not have"
            )
        if entry["image_id"] in wanted:
            x, y, w, h = entry["bbox"]
            box = Box((x, y, x + w, y + h), labels[entry["category_id"]], entry["score"])
            wanted[entry["image_id"]].append(box)
    return [_strongest(wanted[p.record["image_id"]]) for p in pictures]


@torch.no_grad()
def detect(run: Run, pictures: Sequence[Picture]) -> List[List[Box]]:
    """Detections of every picture by the run's checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it does not fit the config.
    """
    path = run.checkpoint
    if path is None:
        raise FileNotFoundError("there are neither stored predictions nor a checkpoint")
    cfg = run.cfg
    logger.info(f"{run.title}: detecting with {path}")
    model = KDTrainer.build_student(cfg).eval()
    load_weights(model, path, allow_unsafe=cfg.KD.ALLOW_UNSAFE_LOAD)
    mapper = NamingMapper(build_mapper(cfg, False))
    result = []
    for picture in pictures:
        record = mapper(dict(picture.record))
        found = model([record])[0]["instances"].to("cpu")
        boxes = zip(
            found.pred_boxes.tensor.tolist(), found.pred_classes.tolist(), found.scores.tolist()
        )
        result.append(_strongest([Box(tuple(box), label, score) for box, label, score in boxes]))
    return result


def _strongest(boxes: List[Box]) -> List[Box]:
    # four digits, as on the page: its script must judge like this program
    boxes = [box._replace(score=round(float(box.score), 4)) for box in boxes]
    boxes = [box for box in boxes if box.score >= MIN_SCORE]
    return sorted(boxes, key=lambda box: -box.score)[:MAX_BOXES]
