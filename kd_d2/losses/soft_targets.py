"""Divergences between the predictions of two networks, from logits, unreduced over the rows."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_d2.losses.precision import full_precision

__all__ = ["kl_divergence", "soft_binary_cross_entropy", "soft_cross_entropy"]


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    bins_reduction: str = "sum",
    *,
    detach_targets: bool = True,
) -> Tensor:
    """tau^2 * KL(softmax(t / tau) || softmax(s / tau)) over the last dimension (Hinton et al.).

    The sum over the bins is the divergence (CrossKD); LD's code takes the mean, which is smaller
    by the number of bins. Teacher zeros(4), student [ln 2, 0, 0, 0]: 0.049857 at tau 1.

    Args:
        student_logits: (..., K).
        teacher_logits: (..., K).
        temperature: tau > 0, dimensionless; tau^2 keeps the gradient's size as tau grows.
        bins_reduction: "sum" or "mean" over the K bins.
        detach_targets: ``teacher_logits`` are constants: no gradient reaches them.

    Returns:
        (...), fp32 or fp64. Equal logits may give -1e-9 instead of 0.

    Raises:
        ValueError: shapes differ, or ``temperature`` or ``bins_reduction`` is not one of the above.
    """
    _check(student_logits, teacher_logits)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}.")
    if bins_reduction not in ("sum", "mean"):
        raise ValueError(f'bins_reduction must be "sum" or "mean", got {bins_reduction!r}.')
    with torch.autocast(student_logits.device.type, enabled=False):
        student = F.log_softmax(full_precision(student_logits) / temperature, dim=-1)
        targets = teacher_logits.detach() if detach_targets else teacher_logits
        teacher = F.log_softmax(full_precision(targets) / temperature, dim=-1)
        terms = temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True)
        return terms.sum(-1) if bins_reduction == "sum" else terms.mean(-1)


def soft_binary_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, detach_targets: bool = True
) -> Tensor:
    """BCE(sigma(s), sigma(t)) per element, from logits.

    Its minimum, at s = t, is the entropy of the teacher's probability, not 0: 0.562335 for
    t = ln 3. For s = 0 it is ln 2 whatever t is.

    Args:
        student_logits: any shape.
        teacher_logits: same shape.
        detach_targets: ``teacher_logits`` are constants: no gradient reaches them.

    Returns:
        tensor of that shape, fp32 or fp64.

    Raises:
        ValueError: shapes differ.
    """
    _check(student_logits, teacher_logits)
    with torch.autocast(student_logits.device.type, enabled=False):
        targets = teacher_logits.detach() if detach_targets else teacher_logits
        targets = full_precision(targets).sigmoid()
        return F.binary_cross_entropy_with_logits(
            full_precision(student_logits), targets, reduction="none"
        )


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, detach_targets: bool = True
) -> Tensor:
    """-sum_c softmax(t)_c log softmax(s)_c over the last dimension, temperature 1 (G-DetKD,
    Sec. 3.4; Joint-DetNAS, L_cls).

    Its minimum, at s = t, is the entropy of the teacher, not 0: 0.832396 for (2, 0, 1). For s = 0
    it is ln K whatever t is.

    Args:
        student_logits: (..., K); K counts the background where there is one.
        teacher_logits: (..., K).
        detach_targets: ``teacher_logits`` are constants: no gradient reaches them.

    Returns:
        (...), fp32 or fp64.

    Raises:
        ValueError: shapes differ.
    """
    _check(student_logits, teacher_logits)
    with torch.autocast(student_logits.device.type, enabled=False):
        targets = teacher_logits.detach() if detach_targets else teacher_logits
        targets = full_precision(targets).softmax(dim=-1)
        return -(targets * F.log_softmax(full_precision(student_logits), dim=-1)).sum(dim=-1)


def _check(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Logits of student and teacher must have one shape, got {tuple(student_logits.shape)} "
            f"and {tuple(teacher_logits.shape)}."
        )
