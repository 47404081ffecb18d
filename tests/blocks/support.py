"""Toy networks without modules: values by key, grids of anchors and pairs on them."""

from types import SimpleNamespace

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from kd_d2.blocks import Grid, Pair
from kd_d2.distillation import DistillationContext, StudentView, build_tap

__all__ = [
    "ToyCodec",
    "ToyView",
    "cell_grid",
    "ground_truth",
    "map_pair",
    "observed",
    "row_pair",
    "square_anchors",
    "toy_ctx",
]


class ToyView:
    """A student or teacher: values by key; the tap knows only the strides of the anchors."""

    def __init__(self, values=None, strides=(8,), size_divisibility=32):
        self._values = dict(values or {})
        self.reads = []
        backbone = SimpleNamespace(size_divisibility=size_divisibility)
        self.model = SimpleNamespace(backbone=backbone, device=torch.device("cpu"))
        self.tap = SimpleNamespace(anchor_strides=lambda model: list(strides))

    def __getitem__(self, key):
        self.reads.append(key)
        return self._values[key]


class ToyCodec:
    """Boxes are their anchors moved by the raw numbers."""

    def apply_deltas(self, deltas, boxes):
        return boxes + deltas


def ground_truth(boxes, size=(32, 32), classes=None):
    """Instances with these boxes, a list of lists; class 0 unless given."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.zeros(len(boxes), dtype=torch.long) if classes is None else classes
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)


def toy_ctx(gt, sizes=None, student=None, teacher=None):
    """Context of a step.

    Args:
        gt: per image a list of boxes.
        sizes: (h, w) of the images, 32x32 by default.
        student, teacher: views.
    """
    sizes = sizes or [(32, 32)] * len(gt)
    padded = tuple(max(s[axis] for s in sizes) for axis in (0, 1))
    return DistillationContext(
        batched_inputs=[{"image": torch.zeros(3, *size)} for size in sizes],
        gt_instances=[ground_truth(boxes, size) for boxes, size in zip(gt, sizes)],
        padded_size=padded,
        student=student or ToyView(),
        teacher=teacher,
        iteration=0,
    )


def cell_grid(stride, height, width=None):
    return Grid(height, width or height, stride)


def square_anchors(grid, sizes=(2.0,), offset=0.5):
    """Anchors of a level in Detectron2's order (y, x, anchor): squares of ``sizes`` strides."""
    boxes = []
    for y in range(grid.height):
        for x in range(grid.width):
            for size in sizes:
                cx, cy = (x + offset) * grid.stride, (y + offset) * grid.stride
                half = size * grid.stride / 2
                boxes.append([cx - half, cy - half, cx + half, cy + half])
    return Boxes(torch.tensor(boxes))


def map_pair(grids, level=0, images=1, channels=2, student=None, teacher=None):
    """Pair of maps; zeros unless given."""
    zeros = torch.zeros(images, channels, grids[level].height, grids[level].width)
    return Pair(
        zeros if student is None else student,
        zeros if teacher is None else teacher,
        True,
        tuple(grids),
        level,
        "neck",
    )


def row_pair(grids, anchors_per_cell, level=None, images=1, channels=2):
    """Pair of rows of zeros in the order of the anchors."""
    chosen = grids if level is None else [grids[level]]
    rows = sum(g.height * g.width for g in chosen) * anchors_per_cell
    zeros = torch.zeros(images, rows, channels)
    return Pair(zeros, zeros, False, tuple(grids), level, "pred.cls")


def observed(student, batch, needs, teacher=None, teacher_needs=()):
    """Context after a training forward of a real ``student``, as :class:`KDModel` makes it."""
    tap = build_tap(student)
    with EventStorage(0), tap.observe(student, {"path:backbone", *needs}) as observation:
        student(batch)
    observation.gt_instances = gt = [x["instances"] for x in batch]
    padded = tuple(observation.single("backbone").inputs[0].shape[-2:])
    run = None if teacher is None else teacher.start(batch, padded, teacher_needs, gt)
    return DistillationContext(
        batched_inputs=batch,
        gt_instances=gt,
        padded_size=padded,
        student=StudentView(observation),
        teacher=run,
        iteration=0,
    )
