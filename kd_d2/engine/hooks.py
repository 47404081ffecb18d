"""Side effects of training that belong to distillation."""

import logging
import math
import os

import torch
from detectron2.engine import HookBase
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm

from kd_d2.data import build_sample_loader
from kd_d2.evaluation import build_sample_evaluator

from .random_state import preserve_random_state

__all__ = ["TeacherEvaluation"]

logger = logging.getLogger(__name__)


class TeacherEvaluation(HookBase):
    """Evaluates the teacher once before training, so that a useless one is noticed at once.

    Runs on all ranks and leaves the random state untouched.
    """

    # below this AP (percent) a teacher is no better than an untrained network
    MIN_AP = 1.0

    def __init__(self, cfg, teacher, num_images: int):
        """
        Args:
            cfg: the student's config: DATASETS.TEST and OUTPUT_DIR.
            teacher: a teacher with a detector (``DetectorTeacher``).
            num_images: sample size per data set; all images if it has no more.
        """
        self._cfg = cfg
        self._teacher = teacher
        self._num_images = num_images

    def before_train(self):
        for name in self._cfg.DATASETS.TEST:
            with preserve_random_state(), torch.no_grad():
                ap = self._evaluate(name)
            if ap is None:
                continue
            logger.info(f"teacher AP on {name} (at most {self._num_images} images): {ap:.2f}")
            if math.isfinite(ap):  # not without any prediction; JSON has no NaN
                self.trainer.storage.put_scalar(f"teacher/{name}/AP", ap, smoothing_hint=False)
            if not ap >= self.MIN_AP:
                logger.warning(
                    f"THE TEACHER'S AP ON {name} IS {ap:.2f}: it has nothing to teach. Check "
                    "KD.TEACHER.WEIGHTS, its config, INPUT.FORMAT and pixel statistics."
                )

    def _evaluate(self, dataset_name):
        teacher_cfg = self._teacher.cfg
        loader = build_sample_loader(teacher_cfg, dataset_name, self._num_images)
        folder = os.path.join(self._cfg.OUTPUT_DIR, "inference_teacher")
        evaluator = build_sample_evaluator(self._cfg, dataset_name, folder)
        results = inference_on_dataset(self._teacher.model, loader, evaluator)
        if not comm.is_main_process():
            return None
        return float(results["bbox"]["AP"])
