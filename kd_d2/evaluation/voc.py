"""Pascal VOC's AP over a sample of the images."""

import os
import tempfile
from typing import Any, Dict, Optional

from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.utils import comm

__all__ = ["SampledPascalVOCEvaluator"]


class SampledPascalVOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's evaluator over the processed images instead of the whole split.

    An image list with those images takes the place of the split's; everything else is inherited.
    """

    def reset(self) -> None:
        super().reset()
        self._processed = set()

    def process(self, inputs, outputs) -> None:
        super().process(inputs, outputs)
        self._processed.update(str(record["image_id"]) for record in inputs)

    def evaluate(self) -> Optional[Dict[str, Any]]:
        """AP, AP50 and AP75 over the processed images of all processes; None but on the first."""
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
