"""What the tests of the feature-imitation baselines share."""

from types import SimpleNamespace
from typing import Any, Dict, List, Sequence

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from kd_d2.distillation import KDModel, KeyInfo, build_distillers, build_tap
from tests.fixtures import teacher_of, tiny_cfg, tiny_model

__all__ = [
    "ToyContext",
    "kd_model",
    "level_keys",
    "neck_keys",
    "networks",
    "run_step",
    "single_anchor_view",
    "terms_of",
]


def networks(arch: str = "GFL", teacher_arch: str = "", **teacher_overrides):
    """Return (student, teacher) with different weights."""
    return tiny_model(arch, 0), teacher_of(tiny_model(teacher_arch or arch, 1, **teacher_overrides))


def kd_model(name: str, student, teacher, arch: str = "GFL", **options) -> KDModel:
    """Return the model that trains ``student`` by one distiller; ``options`` are keys of its node.

    Schedules are left out: every step is fully active.
    """
    node = {"KD.DISTILLERS": (name,)}
    cfg = tiny_cfg(arch, **node, **{f"KD.{name.upper()}.{k}": v for k, v in options.items()})
    keys = build_tap(student).keys(student)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        distillers, _ = build_distillers(cfg, keys, teacher.keys)
    return KDModel(student=student, distillers=distillers, teacher=teacher)


def run_step(model: KDModel, batch) -> Dict[str, torch.Tensor]:
    """Return all losses of one training forward."""
    with EventStorage(0):
        return model(batch)


def terms_of(losses: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Return the distillation terms by their own name."""
    prefix = "loss_kd/"
    return {k.split("/")[-1]: v for k, v in losses.items() if k.startswith(prefix)}


def neck_keys(channels: int = 2, strides: Sequence[int] = (8,), **others: KeyInfo):
    """Return the keys of a network that has a pyramid (and ``others``)."""
    return {"neck": KeyInfo(channels, tuple(strides)), **others}


class ToyContext:
    """A step of two networks that only exist as tensors.

    Args:
        student, teacher: key -> list of maps.
        boxes: ground truth (XYXY) per image.
        image_size: (h, w) of all images.
    """

    def __init__(
        self,
        student: Dict[str, Any],
        teacher: Dict[str, Any],
        boxes: Sequence[List] = ((),),
        image_size=(32, 32),
    ):
        self.student, self.teacher = student, teacher
        self.gt_instances = [_ground_truth(b, image_size) for b in boxes]
        self.image_sizes = [image_size] * len(self.gt_instances)
        self.raw, self._memory = {}, {}

    def memo(self, key, compute):
        if key not in self._memory:
            self._memory[key] = compute()
        return self._memory[key]


def _ground_truth(boxes, image_size) -> Instances:
    tensor = torch.tensor(list(boxes), dtype=torch.float32).reshape(-1, 4)
    classes = torch.zeros(len(tensor), dtype=torch.int64)
    return Instances(image_size, gt_boxes=Boxes(tensor), gt_classes=classes)


def single_anchor_view(keys: Dict[str, Any], side: int = 16, cells: int = 4, stride: int = 8):
    """Return a student's view with ``keys`` and one square anchor in every cell of a map."""
    centres = (torch.arange(cells) + 0.5) * stride
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    half = side / 2
    anchors = Boxes(torch.stack([x - half, y - half, x + half, y + half], dim=-1).reshape(-1, 4))
    values = {**keys, "anchors": [anchors]}
    return _View(values, stride)


class _View(dict):
    def __init__(self, values, stride):
        super().__init__(values)
        self.model = SimpleNamespace()
        self.tap = SimpleNamespace(anchor_strides=lambda model: [stride])


def level_keys(channels: int = 2, stride: int = 8, **others: KeyInfo):
    """Return the keys of a network with one pyramid level that has anchors (and ``others``)."""
    level = KeyInfo(channels, (stride,))
    return {"neck": level, "neck.p3": level, "anchors": KeyInfo(None, (stride,)), **others}
