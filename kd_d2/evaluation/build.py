"""Evaluators by the kind of a data set, and the evaluation of a sample of its images."""

import os
from typing import Any, Callable, Dict, List, Optional

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from fvcore.common.registry import Registry

from .tide import TideEvaluator
from .voc import PascalVOCEvaluator, SampledPascalVOCEvaluator

__all__ = [
    "EVALUATOR_BUILDERS",
    "SubsetEvaluator",
    "build_evaluator",
    "build_sample_evaluator",
]

EVALUATOR_BUILDERS = Registry("EVALUATOR_BUILDERS")
EVALUATOR_BUILDERS.__doc__ = """
Functions ``(cfg, dataset_name, output_folder, sampled) -> DatasetEvaluator``, whose name is the
"evaluator_type" in a data set's metadata. With ``sampled`` the evaluator looks only at the images
it was given instead of expecting all.
"""


class SubsetEvaluator(DatasetEvaluator):
    """COCO's metrics over the images that were processed, whatever else the data set has.

    Args:
        evaluator: its ``evaluate`` takes the argument ``img_ids``, as COCOEvaluator's does.
    """

    def __init__(self, evaluator: DatasetEvaluator):
        self.evaluator = evaluator
        self._image_ids: List[Any] = []

    def reset(self) -> None:
        self._image_ids = []
        self.evaluator.reset()

    def process(self, inputs, outputs) -> None:
        self._image_ids += [record["image_id"] for record in inputs]
        self.evaluator.process(inputs, outputs)

    def evaluate(self) -> Optional[Dict[str, Any]]:
        """The wrapped evaluator's result over the processed images of all processes."""
        gathered = comm.all_gather(self._image_ids)
        image_ids = sorted({image_id for ids in gathered for image_id in ids})
        return self.evaluator.evaluate(img_ids=image_ids)


def build_evaluator(
    cfg, dataset_name: str, output_folder: Optional[str] = None
) -> DatasetEvaluator:
    """The evaluator of a data set, looked up by its "evaluator_type".

    Args:
        cfg: whole config.
        dataset_name: a registered name.
        output_folder: where predictions are written; default: OUTPUT_DIR/inference.

    Raises:
        ValueError: if the data set has no evaluator type or an unknown one.
        FileNotFoundError: if its annotations are not there.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    return _builder(dataset_name)(cfg, dataset_name, folder, False)


def build_sample_evaluator(
    cfg, dataset_name: str, output_folder: Optional[str] = None
) -> DatasetEvaluator:
    """As :func:`build_evaluator`, for the images of :func:`kd_d2.data.build_sample_loader`.

    Args:
        output_folder: default: OUTPUT_DIR/inference_sample.
    """
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference_sample")
    return _builder(dataset_name)(cfg, dataset_name, folder, True)


@EVALUATOR_BUILDERS.register()
def coco(cfg, dataset_name: str, output_folder: str, sampled: bool) -> DatasetEvaluator:
    """COCO's AP, from the data set's JSON file or from its dictionaries, and TEST.TIDE.

    The latter are written in COCO's format once, as <output_folder>/<name>_coco_format.json, and
    again when the "label_file" of the data set's metadata is newer.
    """
    metadata = MetadataCatalog.get(dataset_name)
    json_file = metadata.get("json_file")
    if json_file is not None and not os.path.exists(json_file):
        DatasetCatalog.get(dataset_name)  # generates it, or says what is missing
    cached = os.path.join(output_folder, f"{dataset_name}_coco_format.json")
    evaluator = COCOEvaluator(
        dataset_name,
        output_dir=output_folder,
        allow_cached_coco=not _older(cached, metadata.get("label_file")),
    )
    tide = cfg.TEST.TIDE
    if tide.ENABLED:
        evaluator = TideEvaluator(evaluator, dataset_name, output_folder, tide.THRESHOLDS)
    return SubsetEvaluator(evaluator) if sampled else evaluator


@EVALUATOR_BUILDERS.register()
def pascal_voc(cfg, dataset_name: str, output_folder: str, sampled: bool) -> DatasetEvaluator:
    """Pascal VOC's AP: the 11-point version for 2007, the area for 2012; AP70 and AP90 as well."""
    if cfg.TEST.TIDE.ENABLED:
        raise ValueError(
            f"TEST.TIDE.ENABLED is True, but {dataset_name} has the evaluator type 'pascal_voc' "
            "and error types need 'coco'; set TEST.TIDE.ENABLED False"
        )
    kind = SampledPascalVOCEvaluator if sampled else PascalVOCEvaluator
    return kind(dataset_name)


def _older(path: str, source: Optional[str]) -> bool:
    """Whether a file was written before its source."""
    if source is None or not (os.path.exists(path) and os.path.exists(source)):
        return False
    return os.path.getmtime(path) < os.path.getmtime(source)


def _builder(dataset_name: str) -> Callable[..., DatasetEvaluator]:
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind is None or kind not in EVALUATOR_BUILDERS:
        known = ", ".join(repr(name) for name, _ in EVALUATOR_BUILDERS)
        raise ValueError(
            f"The data set {dataset_name} has the evaluator type {kind!r} in its metadata, but "
            f"only {known} are known; set its evaluator_type or register a builder in "
            "EVALUATOR_BUILDERS."
        )
    return EVALUATOR_BUILDERS.get(kind)
