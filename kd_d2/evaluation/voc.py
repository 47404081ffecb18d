"""Pascal VOC's AP at more thresholds, over a whole split or a sample of its images."""

import logging
import os
import tempfile
from collections import defaultdict
from typing import Any, Dict, List, Optional

import numpy as np
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_eval
from detectron2.utils import comm

__all__ = ["PascalVOCEvaluator", "SampledPascalVOCEvaluator"]

logger = logging.getLogger(__name__)

# percent of IoU; AP is the mean over all of them
_THRESHOLDS = range(50, 100, 5)
_REPORTED = (50, 70, 75, 90)


class PascalVOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's evaluator with AP70 and AP90 besides AP, AP50 and AP75.

    Detectron2 computes them but keeps them to itself.
    """

    def evaluate(self) -> Optional[Dict[str, Any]]:
        """AP, AP50, AP70, AP75 and AP90 in percent, below "bbox"; None but on the first process."""
        gathered = comm.gather(self._predictions, dst=0)
        if not comm.is_main_process():
            return None
        lines: Dict[int, List[str]] = defaultdict(list)
        for predictions in gathered:
            for class_id, found in predictions.items():
                lines[class_id] += found
        metric = 2007 if self._is_2007 else 2012
        logger.info(f"Evaluating {self._dataset_name} with the metric of {metric}")
        with tempfile.TemporaryDirectory(prefix="voc_") as folder:
            template = os.path.join(folder, "{}.txt")
            for class_id, name in enumerate(self._class_names):
                with open(template.format(name), "w") as file:
                    file.write("\n".join(lines.get(class_id, [])))
            means = {percent: self._mean_ap(template, percent) for percent in _THRESHOLDS}
        result = {"AP": np.mean(list(means.values()))}
        result.update({f"AP{percent}": means[percent] for percent in _REPORTED})
        return {"bbox": result}

    def _mean_ap(self, template: str, percent: int) -> float:
        """Mean AP of all classes at one threshold, in percent."""
        precisions = [
            voc_eval(
                template,
                self._anno_file_template,
                self._image_set_path,
                name,
                ovthresh=percent / 100,
                use_07_metric=self._is_2007,
            )[2]
            for name in self._class_names
        ]
        return 100 * np.mean(precisions)


class SampledPascalVOCEvaluator(PascalVOCEvaluator):
    """The same over the processed images instead of the whole split.

    An image list with those images takes the place of the split's; everything else is inherited.
    """

    def reset(self) -> None:
        super().reset()
        self._processed = set()

    def process(self, inputs, outputs) -> None:
        super().process(inputs, outputs)
        self._processed.update(str(record["image_id"]) for record in inputs)

    def evaluate(self) -> Optional[Dict[str, Any]]:
        """As of the base class, over the processed images of all processes."""
        processed = set().union(*comm.all_gather(self._processed))
        whole_split = self._image_set_path
        with tempfile.TemporaryDirectory(prefix="voc_sample_") as folder:
            self._image_set_path = os.path.join(folder, "sample.txt")
            with open(self._image_set_path, "w") as file:
                file.writelines(image_id + "\n" for image_id in sorted(processed))
            try:
                return super().evaluate()
            finally:
                self._image_set_path = whole_split
