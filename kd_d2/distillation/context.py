"""What a distiller sees of one training step."""

from typing import Any, Callable, Dict, Hashable, List, Optional, Tuple

import torch
from detectron2.structures import Instances

from .taps import TapStore
from .teacher import TeacherRun

__all__ = ["DistillationContext", "StudentView"]


class StudentView:
    """Recorded values of the student's own forward pass, by key, with their graph."""

    def __init__(self, store: TapStore):
        self._store = store

    def __getitem__(self, key: str) -> Any:
        return self._store[key]

    @property
    def model(self):
        return self._store.model

    @property
    def tap(self):
        return self._store.tap

    def rest_of_head(self, branch: str, start: int, level_features: List[torch.Tensor]):
        """Run the student's own tower tail; see :meth:`DenseTap.rest_of_head`."""
        return self.tap.rest_of_head(self.model, branch, start, level_features)


class DistillationContext:
    """One batch seen by student and teacher.

    Attributes:
        batched_inputs: as given to the student.
        gt_instances: list[Instances] on the model's device.
        image_sizes: (h, w) of each image before padding.
        padded_size: (H, W) of the student's network input.
        images: (N, C, H, W) that input: normalised, padded with zeros, in the student's order of
            channels; None in a context that no student was run for.
        student: :class:`StudentView`; ``student[key]`` carries gradients.
        teacher: :class:`TeacherRun`, or the run object of another teacher type, or None;
            ``teacher[key]`` has no graph. Its stages run at first use and are shared by all
            distillers of the step.
        iteration: number of the current iteration.
        raw: filled by distillers, ``<label>/<term>`` -> unweighted detached scalar.
    """

    def __init__(
        self,
        *,
        batched_inputs: List[Dict[str, Any]],
        gt_instances: List[Instances],
        padded_size: Tuple[int, int],
        student: StudentView,
        teacher: Optional[TeacherRun],
        iteration: int,
        images: Optional[torch.Tensor] = None,
    ):
        self.batched_inputs = batched_inputs
        self.gt_instances = gt_instances
        self.image_sizes = [tuple(x["image"].shape[-2:]) for x in batched_inputs]
        self.padded_size = padded_size
        self.student = student
        self.teacher = teacher
        self.iteration = iteration
        self.images = images
        self.raw: Dict[str, torch.Tensor] = {}
        self._memory: Dict[Hashable, Any] = {}

    def memo(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, evaluated once per step and ``key`` for all distillers together."""
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]
