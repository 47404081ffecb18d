"""Box losses per pair of boxes: 1 - GIoU and -ln IoU; distances of box deltas per class."""

from typing import Sequence, Tuple

import torch
from torch import Tensor

from kd_d2.losses.precision import full_precision

__all__ = [
    "class_aware_localisation",
    "convert_deltas",
    "giou_loss",
    "iou_log_loss",
    "labelled_class_localisation",
]


def giou_loss(
    pred: Tensor, target: Tensor, eps: float = 1e-6, *, detach_targets: bool = True
) -> Tensor:
    """1 - GIoU of each pair of boxes (Rezatofighi et al., CVPR 2019), in [0, 2].

    GIoU = IoU - (hull - union) / hull. [0,0,2,2] against [1,1,3,3] gives 1.079365, a box against
    itself 0. A box with x2 < x1 or y2 < y1 has area 0, as has a degenerate one; two boxes of area
    0 in one place give 1.

    Args:
        pred: (R, 4), XYXY in absolute pixels.
        target: (R, 4), the same.
        eps: smallest area in square pixels that a division uses.
        detach_targets: ``target`` is a constant: no gradient reaches it.

    Returns:
        (R,), fp32 or fp64.

    Raises:
        ValueError: a shape is not (R, 4), or the two differ.
    """
    _check(pred, target)
    with torch.autocast(pred.device.type, enabled=False):
        target = target.detach() if detach_targets else target
        pred, target = full_precision(pred), full_precision(target)
        intersection, union = _areas(pred, target)
        corner = torch.maximum(pred[:, 2:], target[:, 2:])
        sides = (corner - torch.minimum(pred[:, :2], target[:, :2])).clamp(min=0)
        hull = sides[:, 0] * sides[:, 1]
        iou = intersection / union.clamp(min=eps)
        return 1 - iou + (hull - union) / hull.clamp(min=eps)


def iou_log_loss(
    pred: Tensor, target: Tensor, eps: float = 1e-6, *, detach_targets: bool = True
) -> Tensor:
    """-ln IoU of each pair of boxes (UnitBox), in [0, -ln eps].

    [0,0,2,2] against [1,1,3,3] gives ln 7 = 1.945910; disjoint boxes give 13.815511, and no
    gradient, because the IoU is clamped.

    Args:
        pred: (R, 4), XYXY in absolute pixels.
        target: (R, 4), the same.
        eps: smallest IoU before the logarithm, and smallest area in square pixels.
        detach_targets: ``target`` is a constant: no gradient reaches it.

    Returns:
        (R,), fp32 or fp64.

    Raises:
        ValueError: a shape is not (R, 4), or the two differ.
    """
    _check(pred, target)
    with torch.autocast(pred.device.type, enabled=False):
        target = target.detach() if detach_targets else target
        pred, target = full_precision(pred), full_precision(target)
        intersection, union = _areas(pred, target)
        return -(intersection / union.clamp(min=eps)).clamp(min=eps).log()


def class_aware_localisation(
    student: Tensor, teacher: Tensor, class_weights: Tensor, *, detach_targets: bool = True
) -> Tensor:
    """|| sum_c p_c (d^t_c - d^s_c) ||_1 of each RoI (G-DetKD, eq. 3; Joint-DetNAS).

    Every class that the teacher believes in draws the deltas of that class; the absolute value
    stands outside the sum, so differences of opposite sign cancel. Weights (.5, .3) and
    d^t - d^s = (1,0,0,0), (-1,2,0,0) give |.5 - .3| + |.6| = 0.8.

    Args:
        student: (R, K, 4) deltas of each foreground class, or (R, 1, 4) of a class-agnostic head,
            which stand for all classes.
        teacher: the same, in the student's parametrisation.
        class_weights: (R, K), the teacher's probabilities of the foreground classes.
        detach_targets: ``teacher`` and ``class_weights`` are constants.

    Returns:
        (R,), summed over the 4 deltas, fp32 or fp64.

    Raises:
        ValueError: the shapes do not belong together.
    """
    rows, classes = class_weights.shape if class_weights.dim() == 2 else (-1, -1)
    for deltas in (student, teacher):
        if tuple(deltas.shape) not in ((rows, classes, 4), (rows, 1, 4)):
            raise ValueError(
                "Expected deltas of shape (R, K, 4) or (R, 1, 4) and weights of shape (R, K), got "
                f"{tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(class_weights.shape)}."
            )
    with torch.autocast(student.device.type, enabled=False):
        if detach_targets:
            teacher, class_weights = teacher.detach(), class_weights.detach()
        difference = full_precision(teacher) - full_precision(student)
        weights = full_precision(class_weights).unsqueeze(-1)
        return (weights * difference).sum(dim=1).abs().sum(dim=1)


def labelled_class_localisation(
    student: Tensor, teacher: Tensor, classes: Tensor, *, detach_targets: bool = True
) -> Tensor:
    """|| d^t_c - d^s_c ||_1 of each RoI, c its labelled class: what class-aware distillation is
    compared with (G-DetKD, Table 13; Joint-DetNAS, Table 12).

    Args:
        student: (R, K, 4) deltas of each foreground class, or (R, 1, 4) of a class-agnostic head.
        teacher: the same, in the student's parametrisation.
        classes: (R,) int64 in 0..K-1; foreground RoIs only.
        detach_targets: ``teacher`` is a constant.

    Returns:
        (R,), summed over the 4 deltas, fp32 or fp64.
    """
    with torch.autocast(student.device.type, enabled=False):
        teacher = teacher.detach() if detach_targets else teacher
        difference = _of_class(full_precision(teacher), classes) - _of_class(
            full_precision(student), classes
        )
        return difference.abs().sum(dim=1)


def convert_deltas(deltas: Tensor, source: Sequence[float], target: Sequence[float]) -> Tensor:
    """Return ``deltas`` (..., 4) made with ``Box2BoxTransform`` weights ``source`` as those with
    ``target`` describe the same boxes; fp32 or fp64."""
    deltas = full_precision(deltas)
    return deltas * deltas.new_tensor([t / s for s, t in zip(source, target)])


def _of_class(deltas: Tensor, classes: Tensor) -> Tensor:
    """(R, K or 1, 4) -> (R, 4)."""
    if deltas.shape[1] == 1:
        return deltas[:, 0]
    return deltas[torch.arange(len(classes), device=classes.device), classes]


def _areas(pred: Tensor, target: Tensor) -> Tuple[Tensor, Tensor]:
    """Areas of intersection and union, (R,) each, square pixels."""
    corner = torch.minimum(pred[:, 2:], target[:, 2:])
    sides = (corner - torch.maximum(pred[:, :2], target[:, :2])).clamp(min=0)
    intersection = sides[:, 0] * sides[:, 1]
    area_pred, area_target = (
        ((box[:, 2] - box[:, 0]).clamp(min=0) * (box[:, 3] - box[:, 1]).clamp(min=0))
        for box in (pred, target)
    )
    return intersection, area_pred + area_target - intersection


def _check(pred: Tensor, target: Tensor) -> None:
    if pred.dim() != 2 or pred.shape[1] != 4 or pred.shape != target.shape:
        raise ValueError(
            f"Expected two tensors of boxes of shape (R, 4), got {tuple(pred.shape)} and "
            f"{tuple(target.shape)}."
        )
