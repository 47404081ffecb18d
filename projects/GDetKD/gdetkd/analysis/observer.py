"""One pass of student and teacher over a batch, and the RoIs that training would sample in it."""

from typing import Any, Callable, Dict, Iterable, List

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kd_d2.distillation import (
    DistillationContext,
    Distiller,
    KDModel,
    Teacher,
    build_tap,
    freeze,
)

from ..records import RoIBatch, StudentRoIs

__all__ = ["Look", "RoIObserver"]

# What is done with the RoIs of a batch, of cascades those of the first stage.
Look = Callable[[DistillationContext, RoIBatch], Any]


class _Probe(Distiller):
    """A distiller without a loss that keeps what ``look`` returns."""

    def __init__(self, rois: StudentRoIs, look: Look, student_needs, teacher_needs):
        super().__init__(
            weights={},
            student_needs={*rois.student_needs, *student_needs},
            teacher_needs=teacher_needs,
        )
        self._rois, self._look = rois, look

    @torch.no_grad()
    def compute(self, ctx) -> Dict[str, Tensor]:
        self.seen = self._look(ctx, self._rois(ctx)[0])
        return {}


class RoIObserver:
    """Runs the training forward of a frozen student and looks at its RoIs.

    The detector samples with the ground truth, but its layers are in eval mode: batch norms use
    their running statistics and nothing is dropped at random.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        rois: StudentRoIs,
        look: Look,
        student_needs: Iterable[str] = (),
        teacher_needs: Iterable[str] = (),
    ):
        """
        Args:
            student: is frozen and put into the mode described above.
            teacher: a two-stage detector.
            rois: source of the student's RoIs.
            look: called in every step; its value is what a call returns.
            student_needs, teacher_needs: keys that ``look`` reads.

        Raises:
            ValueError: one side lacks a key.
        """
        self._probe = _Probe(rois, look, student_needs, teacher_needs)
        self._probe.validate(build_tap(student).keys(student), teacher.keys)
        freeze(student)
        self._model = KDModel(student=student, distillers={"probe": self._probe}, teacher=teacher)
        self._model.eval()
        # of these modules alone: not of the layers in them
        sampling = [getattr(student, name, None) for name in ("proposal_generator", "roi_heads")]
        for module in (self._model, student, *sampling):
            if module is not None:
                module.training = True

    def __call__(self, batch: List[Dict[str, Any]]) -> Any:
        """
        Args:
            batch: Detectron2's inputs with ``instances``.
        """
        with torch.enable_grad(), EventStorage(0):
            self._model(batch)
        return self._probe.seen
