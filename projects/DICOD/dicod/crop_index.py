"""Index of the ground-truth boxes of a detection data set that become crops.

No pixels are copied: an entry says which image, where, and of which class. The index of a data set
is stored beside the data and built again when the annotations have changed.
"""

import hashlib
import json
import logging
import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils import comm
from tqdm import tqdm

from kd_d2.checkpoint import atomic_write, file_sha256
from kd_d2.data import dataset_classes, dataset_root

__all__ = ["CropIndex", "build_crop_index", "load_crop_index", "load_crop_indices", "why_dropped"]

logger = logging.getLogger(__name__)

# Part of the fingerprint: raise it when the rules below change.
_VERSION = 1
_ARRAYS = ("file_names", "image_sizes", "image_index", "boxes", "labels")


@dataclass(frozen=True)
class CropIndex:
    """The crops of one data set.

    Attributes:
        name: of the data set.
        classes: class names; a label is a position in them, the detector's class.
        file_names: (I,) str, the images.
        image_sizes: (I, 2) int, their height and width.
        image_index: (n,) int, image of every crop; ascending.
        boxes: (n, 4) float64, as annotated: XYXY, absolute pixels, not clipped.
        labels: (n,) int.
        dropped: reason -> number of annotations that are no crops.
        fingerprint: of the annotations and of the rules applied to them.
    """

    name: str
    classes: Tuple[str, ...]
    file_names: np.ndarray
    image_sizes: np.ndarray
    image_index: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    dropped: Dict[str, int]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    def record(self, i: int) -> Dict[str, Any]:
        """Crop ``i`` as a plain dict: file_name, height, width, box (4,) and label."""
        image = self.image_index[i]
        height, width = self.image_sizes[image].tolist()
        return {
            "file_name": str(self.file_names[image]),
            "height": height,
            "width": width,
            "box": self.boxes[i],
            "label": int(self.labels[i]),
        }

    def counts(self) -> Dict[str, int]:
        """Class name -> number of crops, in the order of the classes."""
        numbers = np.bincount(self.labels, minlength=len(self.classes))
        return dict(zip(self.classes, numbers.tolist()))

    def report(self) -> str:
        """What was kept and dropped, and the crops of every class, as text."""
        lines = [f"{self.name}: {len(self)} crops from {len(self.file_names)} images"]
        lines += [f"  dropped  {count:>8}  {why}" for why, count in sorted(self.dropped.items())]
        lines += [f"  {'dropped':<9}{0:>8}"] * (not self.dropped)
        lines += [f"  crops    {count:>8}  {label}" for label, count in self.counts().items()]
        return "\n".join(lines)

    def save(self, path: str) -> None:
        """Write a ``.npz`` file, completely or not at all."""
        about = {
            "name": self.name,
            "classes": list(self.classes),
            "dropped": self.dropped,
            "fingerprint": self.fingerprint,
        }
        with atomic_write(path) as file:
            np.savez_compressed(
                file, about=json.dumps(about), **{key: getattr(self, key) for key in _ARRAYS}
            )

    @classmethod
    def read(cls, path: str) -> "CropIndex":
        """Inverse of :meth:`save`.

        Raises:
            ValueError: the file is damaged or no index.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(str(file["about"]))
                about["classes"] = tuple(about["classes"])
                return cls(**about, **{key: file[key] for key in _ARRAYS})
        except OSError:
            raise
        except Exception as error:  # a damaged archive may fail in any way
            raise ValueError(f"{path} is no crop index ({error})") from error


def why_dropped(annotation: Dict[str, Any], width: int, height: int) -> Optional[str]:
    """The reason why an annotation is no crop, or None if it is one.

    Those of mmdetection's data sets: an object counts iff it is neither crowd nor ignored, has an
    area, sides of at least one pixel, lies at least partly in the image and is of a known class.

    Args:
        annotation: "bbox" as XYXY (or None), "label" (None: unknown category), and possibly
            "iscrowd", "ignore" and "area" (default: that of the box).
        width, height: of the image.
    """
    if annotation.get("iscrowd"):
        return "crowd"
    if annotation.get("ignore"):
        return "ignored"
    box = annotation["bbox"]
    if box is None or len(box) != 4 or not all(map(math.isfinite, box)):
        return "no valid box"
    x1, y1, x2, y2 = box
    area = annotation.get("area")
    if (area if area is not None else (x2 - x1) * (y2 - y1)) <= 0:
        return "no area"
    # compared as annotated where possible: x + w - x may be a rounding error less than w
    w, h = annotation.get("sides", (x2 - x1, y2 - y1))
    if w < 1 or h < 1:
        return "a side below 1 pixel"
    if min(x2, width) <= max(x1, 0) or min(y2, height) <= max(y1, 0):
        return "outside the image"
    if annotation["label"] is None:
        return "unknown category"
    return None


def build_crop_index(name: str, progress: bool = True) -> CropIndex:
    """Read the annotations of a registered data set and return the index of its crops.

    Data sets in COCO's format (those whose metadata have a ``json_file``) are read from the file
    itself, because Detectron2's loader drops "area" and "ignore"; all others from their
    dictionaries. Nothing is stored.

    Args:
        name: in the DatasetCatalog.
        progress: show a progress bar.

    Raises:
        ValueError: unknown data set, images without a size, or not a single crop.
        FileNotFoundError: the data set is not there.
    """
    source = _source(name)
    return _build(name, source, source.fingerprint(), progress)


def load_crop_index(name: str, folder: str = "", progress: bool = True) -> CropIndex:
    """Return the stored index of a data set; build and store it if there is none or a stale one.

    With several processes the main one builds, the others wait and read.

    Args:
        name: in the DatasetCatalog.
        folder: of the stored indices; default: ``crop_index`` in the folder of the data sets.
        progress: show a progress bar while building.

    Raises:
        ValueError, FileNotFoundError: see :func:`build_crop_index`; a ValueError, too, if the
            folder cannot be written.
    """
    folder = folder or os.path.join(dataset_root(), "crop_index")
    path = os.path.join(folder, f"{name}.npz")
    if comm.is_main_process():
        source = _source(name)
        index = _read_if_current(path, source.fingerprint())
        if index is None:
            index = _build(name, source, source.fingerprint(), progress)
            try:
                os.makedirs(folder, exist_ok=True)
                index.save(path)
            except OSError as error:
                raise ValueError(
                    f"The crop index of {name} could not be stored as {path} ({error}); name a "
                    "folder that can be written in CROP_CLASSIFIER.INDEX_DIR (--index-dir)."
                ) from error
            logger.info("Stored the crop index %s", path)
    comm.synchronize()
    return index if comm.is_main_process() else CropIndex.read(path)


def load_crop_indices(names: Sequence[str], folder: str = "") -> List[CropIndex]:
    """:func:`load_crop_index` of several data sets with equal classes.

    Raises:
        ValueError: there is no name, or the classes or their order differ.
    """
    if not names:
        raise ValueError("No data set to take crops from: DATASETS.TRAIN or DATASETS.TEST is empty")
    indices = [load_crop_index(name, folder) for name in names]
    for index in indices[1:]:
        if index.classes != indices[0].classes:
            raise ValueError(
                f"The data sets {indices[0].name} and {index.name} have different classes, "
                f"{indices[0].classes} and {index.classes}, so they cannot be used together."
            )
    return indices


def _read_if_current(path: str, fingerprint: str) -> Optional[CropIndex]:
    if not os.path.isfile(path):
        return None
    try:
        index = CropIndex.read(path)
    except ValueError as error:
        logger.warning("%s; it is built again.", error)
        return None
    if index.fingerprint == fingerprint:
        return index
    logger.info("%s belongs to other annotations or another version; it is built again.", path)
    return None


def _build(name: str, source: "_Source", fingerprint: str, progress: bool) -> CropIndex:
    dropped: Counter = Counter()
    file_names, sizes, image_index, boxes, labels = [], [], [], [], []
    records = source.records(dropped)
    for record in tqdm(records, f"crops of {name}", disable=not progress, unit="image"):
        width, height = record.get("width"), record.get("height")
        if not width or not height:
            raise ValueError(
                f"The image {record.get('file_name')} of {name} has no width or height in its "
                "annotations; add them where the data set is registered."
            )
        file_names.append(record["file_name"])
        sizes.append((height, width))
        for annotation in record["annotations"]:
            reason = why_dropped(annotation, width, height)
            if reason is not None:
                dropped[reason] += 1
                continue
            image_index.append(len(file_names) - 1)
            boxes.append(annotation["bbox"])
            labels.append(annotation["label"])
    if not labels:
        listed = ", ".join(f"{count} {why}" for why, count in sorted(dropped.items()))
        raise ValueError(f"The data set {name} has no box to crop ({listed or 'no annotation'}).")
    return CropIndex(
        name=name,
        classes=tuple(source.classes),
        file_names=np.array(file_names),
        image_sizes=np.array(sizes, np.int64),
        image_index=np.array(image_index, np.int64),
        boxes=np.array(boxes, np.float64),
        labels=np.array(labels, np.int64),
        dropped=dict(dropped),
        fingerprint=fingerprint,
    )


class _Source:
    """Annotations of a data set as records with "bbox" in XYXY and "label"."""

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        self._fingerprint = ""

    def fingerprint(self) -> str:
        """Changes when the annotations, the classes or the places of the images do."""
        if not self._fingerprint:
            facts = json.dumps(
                [_VERSION, self.classes, *self._facts()], sort_keys=True, default=float
            )
            self._fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        return self._fingerprint

    def _facts(self) -> Iterable[Any]:
        raise NotImplementedError

    def records(self, dropped: Counter) -> Sequence[Dict[str, Any]]:
        """One per image; annotations that belong to none are counted in ``dropped``."""
        raise NotImplementedError


class _CocoFile(_Source):
    def __init__(self, classes, json_file: str, image_root: str, labels: Dict[int, int]):
        super().__init__(classes)
        self._json_file = json_file
        self._image_root = image_root
        self._labels = labels

    def _facts(self):
        labels = sorted(self._labels.items())
        return [os.path.abspath(self._image_root), labels, file_sha256(self._json_file)]

    def records(self, dropped):
        with open(self._json_file, "rb") as file:
            content = json.load(file)
        by_image = defaultdict(list)
        for annotation in content.get("annotations", ()):
            by_image[annotation["image_id"]].append(self._converted(annotation))
        result = [
            {
                "file_name": os.path.join(self._image_root, image["file_name"]),
                "width": image.get("width"),
                "height": image.get("height"),
                "annotations": by_image.pop(image["id"], []),
            }
            for image in content["images"]
        ]
        orphans = sum(map(len, by_image.values()))
        dropped.update({"of an image that is not listed": orphans} if orphans else {})
        return result

    def _converted(self, annotation):
        result = {key: annotation.get(key) for key in ("iscrowd", "ignore", "area")}
        box = annotation.get("bbox")
        if box is not None and len(box) == 4:
            x, y, w, h = box
            box, result["sides"] = [x, y, x + w, y + h], (w, h)
        result["bbox"] = box
        result["label"] = self._labels.get(annotation["category_id"])
        return result


class _Dictionaries(_Source):
    """Any other data set: what its loader returns, category ids being classes already."""

    def __init__(self, classes, dicts: Iterable[Dict[str, Any]]):
        super().__init__(classes)
        self._records = [self._converted(record) for record in dicts]

    def _facts(self):
        return self._records

    def records(self, dropped):
        return self._records

    def _converted(self, record):
        facts = {key: record.get(key) for key in ("file_name", "width", "height")}
        annotations = record.get("annotations") or ()
        return {**facts, "annotations": [self._annotation(a) for a in annotations]}

    def _annotation(self, annotation):
        result = {key: annotation.get(key) for key in ("iscrowd", "ignore", "area")}
        box = annotation.get("bbox")
        if box is not None and len(box) == 4:
            box = BoxMode.convert(list(box), annotation["bbox_mode"], BoxMode.XYXY_ABS)
            box = [float(side) for side in box]
        result["bbox"] = None if box is None else list(box)
        category = annotation["category_id"]
        result["label"] = int(category) if 0 <= category < len(self.classes) else None
        return result


def _source(name: str) -> _Source:
    classes = dataset_classes(name)
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    if not json_file:
        return _Dictionaries(classes, DatasetCatalog.get(name))
    if not os.path.isfile(json_file) or metadata.get("thing_dataset_id_to_contiguous_id") is None:
        DatasetCatalog.get(name)  # generates the files, reads the classes, or says what is missing
    labels = metadata.get("thing_dataset_id_to_contiguous_id")
    return _CocoFile(classes, json_file, metadata.get("image_root", ""), labels)
