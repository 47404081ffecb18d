"""One pass of student and teacher over a batch, and the values that a distiller sees in it."""

from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from kd_d2.checkpoint import load_weights
from kd_d2.distillation import Distiller, KDModel, Teacher, build_tap

from ..compatibility import check_pair

__all__ = ["Observation", "Observer", "PREDICTIONS", "Probe", "load_weights", "student_of"]

# what comparisons of predictions need: (of the student, of the teacher)
PREDICTIONS = (("pred.cls", "pred.box", "anchors", "codec", "assign"), ("pred.cls", "pred.box"))


class Probe(Distiller):
    """A distiller without a loss: it keeps the values that the others of its step are given.

    Attributes:
        student, teacher: key -> value of the last step, with the graph of that step.
        image_sizes: (h, w) of its images before padding.
    """

    def __init__(self, student_keys: Iterable[str], teacher_keys: Iterable[str] = ()):
        super().__init__(weights={}, student_needs=student_keys, teacher_needs=teacher_keys)

    def compute(self, ctx) -> Dict[str, torch.Tensor]:
        self.student = {key: ctx.student[key] for key in self.student_needs}
        self.teacher = {key: ctx.teacher[key] for key in self.teacher_needs}
        self.image_sizes = ctx.image_sizes
        return {}


@dataclass
class Observation:
    """One batch.

    Attributes:
        model: the student.
        student, teacher: key -> value; the student's carry gradients if its parameters do.
        image_sizes: (h, w) of each image before padding.
        losses: as in training, ``loss_kd/<label>/<term>`` among them.
    """

    model: nn.Module
    student: Dict[str, Any]
    teacher: Dict[str, Any]
    image_sizes: List[Tuple[int, int]]
    losses: Dict[str, torch.Tensor]


class Observer:
    """Runs the training forward at a fixed state of the student.

    The detector computes its training losses, but its layers are in eval mode: batch norms use
    their running statistics and nothing is dropped at random, so a picture of one image depends
    on that image alone. Distillers are at full strength, whatever their schedule.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        student_keys: Iterable[str],
        teacher_keys: Iterable[str] = (),
        distillers: Optional[Mapping[str, Distiller]] = None,
    ):
        """
        Args:
            student: a dense detector; put into the mode described above.
            teacher: its teacher.
            student_keys, teacher_keys: what :class:`Observation` shall have.
            distillers: label -> distiller, whose losses are computed, too.

        Raises:
            ValueError: one side lacks a key, or the heads cannot be compared.
        """
        self._probe = Probe(student_keys, teacher_keys)
        keys = build_tap(student).keys(student)
        self._probe.validate(keys, teacher.keys)
        check_pair(keys, teacher.keys, ())
        self._model = KDModel(
            student=student,
            distillers={**(distillers or {}), "probe": self._probe},
            teacher=teacher,
        )
        self._model.eval()
        self._model.training = student.training = True

    def __call__(self, batch: List[Dict[str, Any]]) -> Observation:
        """
        Args:
            batch: Detectron2's inputs with ``instances``.
        """
        with torch.enable_grad(), EventStorage(0):
            losses = self._model(batch)
        return Observation(
            model=self._model.student,
            student=self._probe.student,
            teacher=self._probe.teacher,
            image_sizes=self._probe.image_sizes,
            losses=losses,
        )


def student_of(cfg, weights: str) -> nn.Module:
    """The detector that ``cfg`` describes, with the weights of a checkpoint."""
    model = build_model(cfg)
    load_weights(model, weights, cfg.KD.ALLOW_UNSAFE_LOAD)
    return model
