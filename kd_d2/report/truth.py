"""The test data of runs: images, classes and ground truth, where they can be found."""

import contextlib
import functools
import io
import json
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from kd_d2.data import dataset_classes, register_all
from kd_d2.data.checks import missing_files

from .run import PREDICTIONS, Run

__all__ = ["TestData", "find_test_data", "read_predictions"]


@dataclass
class TestData:
    """A registered data set, as the config of a run defines it.

    Attributes:
        name: in the catalogue.
        identity: equal for runs that were tested on the same files.
        classes: names by contiguous index.
        records: Detectron2's dictionaries, with annotations.
        json_file: ground truth in COCO's format; None if there is none.
        category_ids: contiguous index -> id in predictions and ground truth.
    """

    __test__ = False  # no test of pytest's

    name: str
    identity: str
    classes: List[str]
    records: List[Dict[str, Any]]
    json_file: Optional[str]
    category_ids: Dict[int, int]

    @functools.cached_property
    def coco(self) -> COCO:
        """Ground truth, with the class names of the catalogue.

        Raises:
            FileNotFoundError: there is none in COCO's format.
        """
        if self.json_file is None:
            raise FileNotFoundError(f"{self.name} has no ground truth in COCO's format")
        with contextlib.redirect_stdout(io.StringIO()):
            return COCO(self.json_file)

    @property
    def class_names(self) -> Dict[int, str]:
        """Category id -> name."""
        return {id_: self.classes[index] for index, id_ in self.category_ids.items()}


def find_test_data(run: Run, name: str, cache: Dict[Tuple[str, str], TestData]) -> TestData:
    """The data set ``name`` of a run.

    Args:
        cache: what was found for other runs, by name and place; extended.

    Raises:
        ValueError, FileNotFoundError: the config cannot be read, the name is not registered or
            files are missing. Nothing is generated.
    """
    register_all(run.cfg)
    if name not in DatasetCatalog:
        raise ValueError(f"the data set {name} is not registered")
    metadata = MetadataCatalog.get(name)
    problem = missing_files(name)
    if problem:
        raise FileNotFoundError(problem)
    json_file = metadata.get("json_file")
    if json_file is not None and not os.path.isfile(json_file):
        raise FileNotFoundError(f"its ground truth {json_file} does not exist")
    place = json_file or metadata.get("label_file") or metadata.get("dirname") or name
    if json_file is None:  # written by the evaluator
        path = run.path(os.path.join("inference", f"{name}_coco_format.json"))
        json_file = path if os.path.isfile(path) else None
    key = (name, str(place))
    if key not in cache:
        records = list(DatasetCatalog.get(name))
        classes = dataset_classes(name)
        mapping = metadata.get("thing_dataset_id_to_contiguous_id")
        ids = {index: id_ for id_, index in mapping.items()} if mapping else None
        ids = ids or {index: index for index in range(len(classes))}
        cache[key] = TestData(name, str(place), classes, records, json_file, ids)
    return cache[key]


def read_predictions(run: Run) -> List[Mapping[str, Any]]:
    """The boxes that the last evaluation of a run stored, in COCO's result format.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are not in that format.
    """
    path = run.path(PREDICTIONS)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there are no stored predictions, {PREDICTIONS}")
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except ValueError as error:
        raise ValueError(f"{PREDICTIONS} is not a complete JSON file: {error}") from error
    needed = {"image_id", "category_id", "bbox", "score"}
    if not isinstance(found, list) or not all(
        isinstance(entry, dict) and needed <= set(entry) for entry in found
    ):
        raise ValueError(f"{PREDICTIONS} is not a list of detections in COCO's format")
    return found
