"""Stand-ins for student and teacher in step_time.py: what was asked of a live one, and the answers.

A detector teacher has values by key, and a pass through its RoI head for every list of boxes; a
classifier of crops (DICOD) answers for crops only.
"""

import contextlib
import copy
import itertools
from typing import Any, Callable, Dict, List, Sequence, Tuple

import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import DenseDetector

from kd_d2.distillation import DetectorTeacher, Key, build_tap, freeze

__all__ = ["CropCalls", "RoICalls", "StoredCrops", "StoredView", "note_calls", "plain_teacher"]


class StoredView:
    """Values of a tap by key, as leaves of the graph, in place of a live student or teacher.

    Args:
        store: the live one.
        keys: what is read of it.
        requires_grad: whether the leaves collect gradients.
        roi_calls: what the RoI head answered, call by call of a step; given again in this order.
    """

    def __init__(self, store, keys, requires_grad: bool, roi_calls: Sequence = ()):
        self._store = store
        self.keys = sorted(keys)
        self._values = {key: _leaves(store[key], requires_grad) for key in keys}
        self._answers = itertools.cycle([values for _, _, values in roi_calls])

    def run(self, keys, boxes):
        return next(self._answers)

    def __getitem__(self, key):
        return self._values[key]

    def __getattr__(self, name):
        return getattr(self._store, name)


def _leaves(value: Any, requires_grad: bool) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.requires_grad_(requires_grad and value.is_floating_point())
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [_leaves(item, requires_grad) for item in value]
    return value


class RoICalls:
    """A live teacher that notes (keys, boxes, values) of every pass through its RoI head."""

    def __init__(self, run):
        self._run = run
        self.calls: List[tuple] = []

    def __getitem__(self, key):
        return self._run[key]

    def __getattr__(self, name):
        return getattr(self._run, name)

    def run(self, keys, boxes):
        keys = sorted(keys)
        values = self._run.run(keys, boxes)
        self.calls.append((keys, boxes, values))
        return values

    # what step_time.py does with them
    def replay(self, run) -> None:
        """Ask ``run``, a live teacher on the same batch, the same again."""
        for keys, boxes, _ in self.calls:
            run.run(keys, boxes)

    def view(self, keys) -> StoredView:
        """What answers without computing."""
        return StoredView(self._run, keys, False, self.calls)


class CropCalls:
    """A live classifier that notes (method, crops, its other arguments) of every call.

    The stored crops ask for a gradient if those of the call did.
    """

    def __init__(self, teacher):
        self._teacher = teacher
        self.calls: List[Tuple[str, torch.Tensor, tuple]] = []

    def logits(self, crops):
        return self._noted("logits", crops)

    def features(self, crops, layers):
        return self._noted("features", crops, tuple(layers))

    def _noted(self, method, crops, *args):
        self.calls.append((method, _leaves(crops, crops.requires_grad), args))
        return getattr(self._teacher, method)(crops, *args)

    def replay(self, teacher) -> None:
        """Ask for the same again, and pull the gradient back to the crops where one was wanted."""
        for method, crops, args in self.calls:
            with contextlib.nullcontext() if crops.requires_grad else torch.no_grad():
                values = getattr(teacher, method)(crops, *args)
            if crops.requires_grad:
                torch.autograd.grad(sum(value.sum() for value in values.values()), crops)

    def view(self, keys) -> "StoredCrops":
        """What answers without computing."""
        return StoredCrops(self._teacher, self.calls)


class StoredCrops:
    """Answers of a classifier to the calls of a step, by method, number of crops and layers.

    Features are leaves of the graph: their gradient ends there.
    """

    def __init__(self, teacher, calls):
        self._answers: Dict[tuple, Any] = {}
        for method, crops, args in calls:
            with torch.no_grad():
                values = getattr(teacher, method)(crops, *args)
            if isinstance(values, dict):
                values = {k: _leaves(v, crops.requires_grad) for k, v in values.items()}
            self._answers[(method, len(crops), crops.requires_grad, args)] = values

    def logits(self, crops):
        return self._answers[("logits", len(crops), crops.requires_grad, ())]

    def features(self, crops, layers):
        return self._answers[("features", len(crops), crops.requires_grad, (tuple(layers),))]


def note_calls(model, run):
    """What notes the calls to ``run``, the teacher of the distilled ``model`` on a batch."""
    return RoICalls(run) if isinstance(model.teacher, DetectorTeacher) else CropCalls(run)


# ------------------------------------------------------------------------- the plain teacher
def plain_teacher(cfg, model, calls) -> Tuple[torch.nn.Module, Callable]:
    """The teacher's network, and its forward in eval mode without anything of ours: a detector's
    as Detectron2 runs it, without decoding and NMS, a classifier's on the crops of a step.

    Args:
        calls: :class:`RoICalls` or :class:`CropCalls` of one step.
    """
    if isinstance(calls, CropCalls):
        return _plain_classifier(model, calls)
    plain = freeze(build_model(DetectorTeacher.load_config(cfg)))
    plain.load_state_dict(model.teacher.state_to_copy())
    # a MimicDet is dense, but what it teaches is its T-head, on boxes
    dense = isinstance(plain, DenseDetector) and plain.head is not None
    head = _dense_head if dense else _roi_head

    def forward(batch):
        with torch.no_grad():
            images = plain.preprocess_image(batch)
            head(plain, plain.backbone(images.tensor), calls.calls)

    return plain, forward


def _plain_classifier(model, calls: CropCalls):
    """A crop passes once, whatever is read of it; no gradient is asked for."""
    teacher = copy.copy(model.teacher)
    teacher.model = copy.deepcopy(teacher.model).to(memory_format=torch.contiguous_format)

    def forward(batch):
        with torch.no_grad():
            for method, crops, args in calls.calls:
                getattr(teacher, method)(crops, *args)

    return teacher.model, forward


def _dense_head(plain, features, roi_calls) -> None:
    plain.head([features[f] for f in plain.head_in_features])


def _roi_head(plain, features, roi_calls) -> None:
    """One pass for each list of boxes, for everything that was asked of them."""
    keys: Dict[int, set] = {}
    boxes = {id(boxes): boxes for _, boxes, _ in roi_calls}
    for names, of, _ in roi_calls:
        keys.setdefault(id(of), set()).update(names)
    for number, names in keys.items():
        parsed = [Key.parse(name) for name in sorted(names)]
        build_tap(plain).run_rois(plain, features, boxes[number], parsed)
