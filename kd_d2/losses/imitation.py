"""Imitation of feature maps: per-channel standardisation, PKD, and CrossKD's alignment."""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_d2.losses.precision import full_precision

__all__ = ["align_statistics", "pkd_loss", "standardise"]


def standardise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x`` with mean 0 and standard deviation 1 per channel, over (N, H, W) together.

    (x - mu_c) / (sigma_c + eps), with Bessel's correction in sigma; differentiable through both
    statistics. A constant channel becomes 0, as does a map with N*H*W < 2.

    Args:
        x: (N, C, H, W); half precision is cast to fp32.
        eps: added to the standard deviation, in the unit of ``x``.

    Returns:
        (N, C, H, W), fp32 or fp64.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = full_precision(x)
        return _Matched.apply(x, None, eps)


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the mean squared difference of the standardised maps: PKD (Cao et al., NeurIPS 2022).

    Equals the mean over channels of (1 - rho_c)(m - 1)/m, rho_c Pearson's correlation of the two
    channels and m = N*H*W: 0 for maps that are affine to each other per channel (with positive
    slope), 1.95 for opposite ones with m = 40, and 0.15 for [1,3,2,4] against [1,2,3,4].
    Statistics are those of the rank's batch, as in the official code.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W), a constant: no gradient reaches it.

    Returns:
        fp32 (or fp64) scalar; 0, connected to ``student``, if the maps are empty.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"PKD compares maps of one shape, got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}: adapt the channels or resize one of them first."
        )
    with torch.autocast(student.device.type, enabled=False):
        difference = standardise(student) - standardise(teacher.detach())
        return 0.5 * difference.square().sum() / max(difference.numel(), 1)


def align_statistics(student: Tensor, teacher: Tensor, eps: float = 1e-6) -> Tensor:
    """``student`` with the teacher's mean and standard deviation per channel.

    (s - mu_s) / (sigma_s + eps) * sigma_t + mu_t over (N, H, W), Bessel's correction in both
    sigmas: the step of CrossKD's official code before a student feature enters the teacher's head
    (the paper does not mention it). [0,1,2,3] against [0,0,4,4] gives [-0.683280, 1.105573,
    2.894427, 4.683280].

    The student's statistics are differentiated through, hence the gradient at the student sums to
    0 per channel. A constant student channel gives mu_t everywhere, and its gradient is finite but
    of the order sigma_t / eps.

    Args:
        student: (N, C, H, W).
        teacher: (N', C, H', W'), a constant: no gradient reaches it.
        eps: added to the student's standard deviation, in the unit of the features.

    Returns:
        (N, C, H, W), fp32 (or fp64); ``student`` itself, cast only, if one of the maps has fewer
        than two positions, for which there is no standard deviation.

    Raises:
        ValueError: the numbers of channels differ.
    """
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"Alignment needs equal channels, got student {tuple(student.shape)} and teacher "
            f"{tuple(teacher.shape)}: the heads of both networks must have the same width."
        )
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = full_precision(student), full_precision(teacher.detach())
        if min(_positions(student), _positions(teacher)) < 2:
            return student
        return _Matched.apply(student, teacher, eps)


class _Matched(torch.autograd.Function):
    """``x`` standardised per channel, and given the statistics of a reference.

    y = (x - mu) k + mu_r with k = sigma_r / (sigma + eps); mu_r = 0 and sigma_r = 1 without a
    reference. With g the gradient at y and m the number of positions,

        dL/dx = k (g - mean(g)) - (x - mu) k sum(g (x - mu)) / ((m - 1) sigma (sigma + eps)),

    the last term 0 where sigma is. Written out, because it takes a few passes over the map where
    autograd takes many, and keeps nothing but ``x``.
    """

    @staticmethod
    def forward(ctx, x: Tensor, reference: Optional[Tensor], eps: float) -> Tensor:
        result, pivot, mean, std = _centred(x)
        gain = 1 / (std + eps)
        if reference is not None:
            _, reference_pivot, reference_mean, reference_std = _centred(reference)
            gain = reference_std * gain
        ctx.save_for_backward(x, pivot + mean, std, gain)
        ctx.eps = eps
        result.mul_(gain)
        if reference is not None:
            result.add_(reference_pivot + reference_mean)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, mean, std, gain = ctx.saved_tensors
        # mixed memory formats are slow in every pass
        grad = torch.empty_like(x).copy_(grad)
        centred = x - mean
        slope = (grad * centred).sum(_CHANNEL, keepdim=True)
        slope = slope * gain / (max(_positions(x) - 1, 1) * std * (std + ctx.eps))
        centred.mul_(slope.masked_fill(std == 0, 0.0))
        offset = grad.mean(_CHANNEL, keepdim=True) if x.numel() else grad.new_zeros(())
        return (grad - offset).mul_(gain).sub_(centred), None, None


_CHANNEL = (0, 2, 3)


def _centred(x: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x`` minus its mean, and two parts of the mean and the deviation, (1, C, 1, 1) each.

    A value of the map is subtracted first: a constant channel becomes exactly 0. Sums and
    products are several times as fast as ``torch.std_mean`` on the CPU.
    """
    if not x.numel():
        zero = x.new_zeros((1, x.shape[1], 1, 1))
        return torch.zeros_like(x), zero, zero, zero
    pivot = x[:1, :, :1, :1]
    centred = x - pivot
    mean = centred.mean(_CHANNEL, keepdim=True)
    centred.sub_(mean)
    squares = (centred * centred).sum(_CHANNEL, keepdim=True)
    return centred, pivot, mean, (squares / max(_positions(x) - 1, 1)).sqrt()


def _positions(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]
