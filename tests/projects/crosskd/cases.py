"""What the tests of CrossKD share: small pairs of detectors, and contexts made by hand."""

import functools
from types import SimpleNamespace

import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from kd_d2.distillation import Assignment, KDModel, build_distillers, build_tap
from tests.fixtures import teacher_of, tiny_cfg, tiny_model

# meta-architecture and overrides, by the name of a test case
DETECTORS = {
    "GFL": ("GFL", {}),
    "RetinaNet": ("RetinaNet", {}),
    "ATSS": ("ATSS", {}),
    "FCOS": ("FCOS", {}),
    "FCOS-d2": ("FCOS", {"MODEL.FCOS.PRESET": "d2"}),
}
# stages of the towers of tests.fixtures
NUM_STAGES = 2


def detector(name, seed=0):
    """A fresh detector of :data:`DETECTORS`."""
    arch, overrides = DETECTORS[name]
    return tiny_model(arch, seed, **overrides)


@functools.lru_cache(maxsize=None)
def pair(name):
    """Student and frozen teacher of one kind; shared by tests, which must not change them."""
    return detector(name, 0), teacher_of(detector(name, 1))


def crosskd_cfg(name, distillers=("CrossKD",), **options):
    """Config with ``KD.CROSSKD`` at position 1; ``options`` are its keys, or dotted ones."""
    arch, overrides = DETECTORS[name]
    values = {"POSITION": 1, **options}
    dotted = {k if "." in k else f"KD.CROSSKD.{k}": v for k, v in values.items()}
    return tiny_cfg(arch, **overrides, **{"KD.DISTILLERS": distillers, **dotted})


def kd_model(name, student=None, teacher=None, distillers=("CrossKD",), **options):
    """A KDModel of ``pair(name)``, or of the given networks."""
    default = pair(name) if student is None or teacher is None else (None, None)
    student = default[0] if student is None else student
    teacher = default[1] if teacher is None else teacher
    cfg = crosskd_cfg(name, distillers, **options)
    built, schedules = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    return KDModel(student=student, distillers=built, teacher=teacher, schedules=schedules)


def run(model, batch):
    """All losses of one training forward."""
    with EventStorage(0):
        return model(batch)


def kd_terms(losses, label="crosskd"):
    """The terms of one distiller, without prefix."""
    prefix = f"loss_kd/{label}/"
    return {k[len(prefix) :]: v for k, v in losses.items() if k.startswith(prefix)}


def gradients(loss, model):
    """Name -> gradient or None, of every trainable parameter of ``model``."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return dict(zip(names, found))


class Side(dict):
    """Student or teacher of a context: values by key, and a head that is a plain function."""

    def __init__(self, values, model=None, rest_of_head=None):
        super().__init__(values)
        self.model = model
        self._rest_of_head = rest_of_head

    def rest_of_head(self, branch, start, level_features):
        return self._rest_of_head(branch, start, level_features)


def context(
    student, teacher, codec, labels, boxes=((0.0, 0.0, 4.0, 4.0),) * 2, anchor=(0, 0, 4, 4)
):
    """Context of two images with one position each; two classes.

    Args:
        student, teacher: key -> one row of numbers per image.
        codec: box coder of both.
        labels: per image, -1 ignored, 0 or 1 positive, 2 background.
        boxes: matched ground truth per image.
        anchor: of the position.
    """
    model = SimpleNamespace(
        num_classes=2,
        anchor_generator=SimpleNamespace(strides=[4], offset=(anchor[0] + anchor[2]) / 8),
        backbone=SimpleNamespace(size_divisibility=0),
    )
    common = {
        "anchors": [Boxes(torch.tensor([anchor], dtype=torch.float32))],
        "codec": codec,
        "assign": Assignment(
            torch.tensor(labels).reshape(2, 1), torch.tensor(boxes).reshape(2, 1, 4), 2
        ),
    }
    sides = [
        Side({**common, **{key: [rows(value)] for key, value in side.items()}}, model)
        for side in (student, teacher)
    ]
    return SimpleNamespace(student=sides[0], teacher=sides[1], image_sizes=[(4, 4)] * 2, raw={})


def rows(value):
    """(2, D) numbers as a level (2, D, 1, 1)."""
    return torch.as_tensor(value, dtype=torch.float32).reshape(2, -1, 1, 1)
