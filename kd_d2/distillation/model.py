"""The module that is trained: a student and its distillers, with a teacher held aside."""

import logging
import math
from typing import Any, Dict, List, Mapping, Optional

import torch
from detectron2.utils.events import get_event_storage
from torch import nn

from .context import DistillationContext, StudentView
from .distiller import Distiller
from .gradients import compare_gradients
from .schedule import LossSchedule
from .taps import build_tap
from .teacher import Teacher

__all__ = ["KDModel"]

logger = logging.getLogger(__name__)


class KDModel(nn.Module):
    """Adds distillation losses to a detector's own losses.

    The student's training forward runs unmodified while a recorder observes it; distillers then
    compare what was recorded with the teacher. In eval mode, or without gradients (PreciseBN),
    this is ``student(batched_inputs)``.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        distillers: Mapping[str, Distiller],
        teacher: Optional[Teacher],
        schedules: Optional[Mapping[str, LossSchedule]] = None,
        grad_ratio_period: int = 0,
        zero_warning_iters: int = 0,
    ):
        """
        Args:
            student: a detector of a family that has a tap.
            distillers: label -> distiller.
            teacher: a plain object, never a ``nn.Module``; None if no distiller needs one.
            schedules: label -> schedule; a label without one is always fully active.
            grad_ratio_period: every so many iterations log the gradient norm of each
                distiller's loss at the pyramid relative to the detection losses'. 0: never.
            zero_warning_iters: warn once when an active term was exactly 0 this often in a row.

        Raises:
            ValueError: a distiller needs a teacher and there is none, a key that its side does
                not have, or the teacher is a module.
        """
        super().__init__()
        if isinstance(teacher, nn.Module):
            raise ValueError("the teacher must not be a nn.Module: it would be trained and saved")
        self.student = student
        self.distillers = nn.ModuleDict(distillers)
        self.teacher = teacher
        self.tap = build_tap(student)
        self.schedules = dict(schedules or {})
        self.grad_ratio_period = grad_ratio_period
        self.zero_warning_iters = zero_warning_iters
        self._zeros_in_a_row: Dict[str, int] = {}

        for label, distiller in self.distillers.items():
            if distiller.needs_teacher and teacher is None:
                raise ValueError(f"distiller '{label}' needs a teacher, but there is none")
            if distiller.copies_teacher:
                distiller.load_teacher_state(teacher.state_to_copy())
        # the backbone's input are the student's images, hence "backbone" is always observed
        needs = {"path:backbone"}.union(*(d.student_needs for d in self.distillers.values()))
        self._student_needs = sorted(needs)
        self._teacher_needs = sorted(
            set().union(*(d.teacher_needs for d in self.distillers.values()))
        )
        self.tap.checked(student, self._student_needs)

    @property
    def device(self) -> torch.device:
        return self.student.device

    def forward(self, batched_inputs: List[Dict[str, Any]]):
        """
        Args:
            batched_inputs: Detectron2's list of dicts.

        Returns:
            In training, the student's losses plus ``loss_kd/<label>/<term>`` for every term, the
            same keys in every step; otherwise the student's detections.
        """
        if not self.training or not torch.is_grad_enabled():
            return self.student(batched_inputs)
        # both networks' keys were checked when they were built
        with self.tap.observe(self.student, self._student_needs, check=False) as observation:
            losses = self.student(batched_inputs)
        iteration = get_event_storage().iter
        ctx = self._context(batched_inputs, observation, iteration)
        kd_losses = {}
        for label, distiller in self.distillers.items():
            for term, value in self._run(label, distiller, ctx, losses).items():
                kd_losses[f"loss_kd/{label}/{term}"] = value
        self._log_raw(ctx.raw)
        if self.grad_ratio_period and iteration % self.grad_ratio_period == 0:
            self._log_gradients(losses, kd_losses, observation)
        return {**losses, **kd_losses}

    def _context(self, batched_inputs, observation, iteration) -> DistillationContext:
        device = self.student.device
        gt_instances = [x["instances"].to(device) for x in batched_inputs]
        observation.gt_instances = gt_instances
        images = observation.single("backbone").inputs[0]
        padded_size = tuple(images.shape[-2:])
        teacher = None
        if self.teacher is not None:
            teacher = _LazyTeacher(
                lambda: self.teacher.start(
                    batched_inputs, padded_size, self._teacher_needs, gt_instances
                )
            )
        return DistillationContext(
            batched_inputs=batched_inputs,
            gt_instances=gt_instances,
            padded_size=padded_size,
            student=StudentView(observation),
            teacher=teacher,
            iteration=iteration,
            images=images,
        )

    def _run(self, label, distiller, ctx, losses) -> Dict[str, torch.Tensor]:
        schedule = self.schedules.get(label)
        factor = 1.0 if schedule is None else schedule(ctx.iteration)
        get_event_storage().put_scalar(f"kd_factor/{label}", factor)
        if factor == 0.0:
            return distiller.inactive(next(iter(losses.values())))
        terms = distiller(ctx)
        return {term: factor * value for term, value in terms.items()} if factor != 1.0 else terms

    def _log_raw(self, raw: Dict[str, torch.Tensor]) -> None:
        """Log unweighted values; warn about a term that stays exactly zero: it teaches nothing."""
        if not raw:
            return
        # one transfer for all terms: each would wait for the device by itself
        values = torch.stack([value.float() for value in raw.values()]).tolist()
        for name, value in zip(raw, values):
            get_event_storage().put_scalar(f"kd_raw/{name}", value)
            count = self._zeros_in_a_row.get(name, 0) + 1 if value == 0.0 else 0
            self._zeros_in_a_row[name] = count
            if self.zero_warning_iters and count == self.zero_warning_iters:
                logger.warning(
                    f"loss_kd/{name} has been exactly 0 for {count} active iterations in a row: "
                    "it does not teach anything; check its region, weight and taps"
                )

    def _log_gradients(self, losses, kd_losses, observation) -> None:
        """Log |d L_kd / d pyramid| / |d L_det / d pyramid| and the cosine of both gradients per
        distiller, and per term of those that have several.

        Gradients with respect to activations do not reach any parameter, hence not DDP's hooks.
        """
        pyramid = observation.single("backbone").output
        features = [f for f in pyramid.values() if f.requires_grad]
        if not features:
            return
        detector = ""  # no distiller's label
        pulls = {detector: sum(losses.values())}
        for label, distiller in self.distillers.items():
            terms = {f"{label}/{t}": kd_losses[f"loss_kd/{label}/{t}"] for t in distiller.terms}
            pulls[label] = sum(terms.values())
            pulls.update(terms if len(terms) > 1 else {})
        gradients = compare_gradients(pulls, {"pyramid": features}, detector)
        detection = max(gradients.pop(detector)["pyramid"].norm, 1e-12)
        for name, of in gradients.items():
            norm, cosine = of["pyramid"]
            get_event_storage().put_scalar(f"kd_grad_ratio/{name}", norm / detection)
            if math.isfinite(cosine):
                get_event_storage().put_scalar(f"kd_grad_cosine/{name}", cosine)


class _LazyTeacher:
    """Starts the teacher at its first use: a step without active distillers costs nothing."""

    def __init__(self, start):
        self._start = start
        self._run = None

    def _started(self):
        if self._run is None:
            self._run = self._start()
        return self._run

    def __getitem__(self, key):
        return self._started()[key]

    def __getattr__(self, name):
        return getattr(self._started(), name)
