"""Detections in COCO's format, with the list of images that they belong to."""

import json
import os
from typing import Any, Dict, List, Sequence

from detectron2.config import CfgNode
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from kd_d2.checkpoint import atomic_write

from .detector import known_metadata
from .sources import Frame, Source

__all__ = ["CocoResults"]


class CocoResults:
    """Collects detections, all that the network gives, and writes them.

    Images are numbered from 1 in the order in which they come. Category ids are those of the
    config's data set if it has as many classes, as in ``coco_instances_results.json`` of an
    evaluation; otherwise 1 for the first class, and so on.

    Args:
        class_names: by class index.
        cfg: whose DATASETS say how categories are numbered.
    """

    def __init__(self, class_names: Sequence[str], cfg: CfgNode):
        self.images: List[Dict[str, Any]] = []
        self._names = list(class_names)
        self._ids = _category_ids(cfg, len(self._names))
        self._results: Dict[str, List[Dict[str, Any]]] = {}

    def add_image(self, source: Source, frame: Frame) -> int:
        """Number an image; return its id."""
        height, width = frame.image.shape[:2]
        entry = {"id": len(self.images) + 1, "file_name": source.path or source.title}
        entry.update(height=int(height), width=int(width))
        if frame.number is not None:
            entry["frame"] = frame.number
        self.images.append(entry)
        return entry["id"]

    def add(self, who: str, image_id: int, detections: Instances) -> None:
        """Add the detections of one network.

        Args:
            who: the network.
            image_id: of :meth:`add_image`.
            detections: on the CPU.
        """
        results = instances_to_coco_json(detections, image_id)
        for result in results:
            result["category_id"] = self._id(result["category_id"])
        self._results.setdefault(who, []).extend(results)

    def write(self, folder: str, names: Dict[str, str]) -> List[str]:
        """Write ``images.json``, which is COCO's ground truth without annotations, and the rest.

        Args:
            folder: exists.
            names: network -> name of the file for its detections.

        Returns:
            paths.
        """
        categories = [{"id": self._id(i), "name": name} for i, name in enumerate(self._names)]
        contents: Dict[str, Any] = {
            "images.json": {"images": self.images, "categories": categories, "annotations": []}
        }
        contents.update({names[who]: self._results.get(who, []) for who in names})
        for name, content in contents.items():
            with atomic_write(os.path.join(folder, name)) as file:
                file.write(json.dumps(content).encode())
        return [os.path.join(folder, name) for name in contents]

    def _id(self, index: int) -> int:
        return self._ids[index] if self._ids else index + 1


def _category_ids(cfg: CfgNode, count: int) -> List[int]:
    """Ids by class index; empty if no data set of the config fits."""
    for name in [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]:
        ids = known_metadata(name).get("thing_dataset_id_to_contiguous_id") or {}
        if count and len(ids) == count:
            return [dataset_id for dataset_id, _ in sorted(ids.items(), key=lambda item: item[1])]
    return []
