"""Error types beside AP in what an evaluator returns."""

import json
import logging
import os
from typing import Any, Collection, Dict, Optional, Sequence

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator

from .analysis import check_thresholds, tide_errors

__all__ = ["TideEvaluator"]

logger = logging.getLogger(__name__)


class TideEvaluator(DatasetEvaluator):
    """COCO's metrics and, under "tide", AP points that each type of error costs.

    Reads the predictions that COCOEvaluator writes. "tide" is left out where there is no
    prediction, no annotation, or no AP of boxes. ``coco_tide.json`` beside the predictions has
    everything, the numbers of errors too.

    Args:
        evaluator: writes ``coco_instances_results.json``.
        dataset_name: a registered name.
        output_folder: that of ``evaluator``.
        thresholds: foreground IoUs, ascending.

    Raises:
        ValueError: the thresholds are wrong.
    """

    def __init__(
        self,
        evaluator: COCOEvaluator,
        dataset_name: str,
        output_folder: str,
        thresholds: Sequence[float],
    ):
        self.evaluator = evaluator
        self._metadata = MetadataCatalog.get(dataset_name)
        self._folder = output_folder
        self._thresholds = check_thresholds(thresholds, "TEST.TIDE.THRESHOLDS")

    def reset(self) -> None:
        self.evaluator.reset()

    def process(self, inputs, outputs) -> None:
        self.evaluator.process(inputs, outputs)

    def evaluate(self, img_ids: Optional[Collection[Any]] = None) -> Optional[Dict[str, Any]]:
        """The wrapped evaluator's result, with "tide" in the main process.

        Args:
            img_ids: images that count; default: all.
        """
        result = self.evaluator.evaluate(img_ids=img_ids)
        if not result or "bbox" not in result:  # not the main process, or nothing was judged
            return result
        with open(os.path.join(self._folder, "coco_instances_results.json")) as f:
            predictions = json.load(f)
        if not predictions:
            logger.warning("no error types (TEST.TIDE): there is no prediction")
            return result
        with open(self._metadata.json_file) as f:
            gt = json.load(f)
        tide = tide_errors(gt, predictions, self._thresholds, image_ids=img_ids)
        with open(os.path.join(self._folder, "coco_tide.json"), "w") as f:
            json.dump(tide.as_dict(), f, indent=1)
        result["tide"] = tide.metrics()
        return result
