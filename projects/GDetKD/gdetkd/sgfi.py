"""Semantic-guided feature imitation: SGFI (Sec. 3.2 of the G-DetKD paper)."""

import math
from typing import NamedTuple, Tuple

import torch
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kd_d2.losses.precision import full_precision

__all__ = ["MIN_SIZE", "SGFI", "SGFIOutput"]

# smallest height and width that two 3x3 convolutions of stride 2 without padding can take
MIN_SIZE = 7
_LOG_TAU_RANGE = (math.log(0.01), math.log(100.0))


class SGFIOutput(NamedTuple):
    """Result of one batch.

    Attributes:
        loss: unweighted scalar, mean over the RoIs.
        alpha: (N, L) weights of the levels, without graph.
        tau: scalar, temperature that was used, without graph.
    """

    loss: Tensor
    alpha: Tensor
    tau: Tensor


class SGFI(nn.Module):
    """A RoI's features from all levels of the student, weighted by how they resemble the teacher's.

    With A^l = f_adapt(S^l) and keys K = f_embed(A^l), f_embed(T): alpha = softmax_l(K_s . K_t /
    tau) and loss = 1/N sum_i mean((sum_l alpha^l A^l - T)^2), eq. 1. The mean runs over C, h and w;
    N is the number of RoIs of this rank.
    """

    def __init__(
        self,
        *,
        student_channels: int,
        teacher_channels: int,
        num_levels: int,
        key_dim: int = 128,
        tau_init: float = 0.0,
        chunk: int = 0,
    ):
        """
        Args:
            student_channels, teacher_channels: widths; f_adapt is there also if they agree.
            num_levels: L. With 1, alpha is 1, and there is neither f_embed nor tau.
            key_dim: channels of the keys.
            tau_init: start of the learnable temperature, in 0.01..100; 0: sqrt(key_dim).
            chunk: so many RoIs at a time, recomputed in the backward pass instead of keeping their
                activations; 0: off.

        Raises:
            ValueError: a number is out of its range.
        """
        super().__init__()
        tau = tau_init or math.sqrt(max(key_dim, 0))
        for key, value, fits in (
            ("KEY_DIM", key_dim, key_dim > 0),
            ("TAU_INIT", tau_init, 0.01 <= tau <= 100),
            ("CHUNK", chunk, chunk >= 0),
        ):
            if not fits:
                raise ValueError(f"KD.GDETKD.SGFI.{key} is out of its range: {value}")
        self.num_levels, self._chunk = num_levels, chunk
        self.adapt = nn.Conv2d(student_channels, teacher_channels, 3, padding=1)
        if num_levels > 1:
            self.embed = nn.Sequential(
                nn.Conv2d(teacher_channels, key_dim, 3, stride=2),
                nn.ReLU(),
                nn.Conv2d(key_dim, key_dim, 3, stride=2),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            self.log_tau = nn.Parameter(torch.tensor(math.log(tau)))
        # not f_embed: keys of torch's smaller start values make alpha nearly uniform at first
        c2_xavier_fill(self.adapt)

    def forward(self, student: Tensor, teacher: Tensor) -> SGFIOutput:
        """Return loss, weights and temperature.

        Args:
            student: (N, L, C_s, h, w), with graph.
            teacher: (N, C, h, w), a constant.

        Raises:
            ValueError: the arguments differ in N, h or w, or are too small for f_embed.
        """
        self._check(student, teacher)
        student, teacher = full_precision(student), full_precision(teacher.detach())
        number = len(student)
        rows = self._chunk if 0 < self._chunk < number else max(number, 1)
        parts = []
        for part in zip(student.split(rows), teacher.split(rows)):
            if rows < number and torch.is_grad_enabled():
                result = checkpoint(
                    self._row_losses, *part, use_reentrant=False, preserve_rng_state=False
                )
            else:
                result = self._row_losses(*part)
            parts.append(result)
        losses, alpha = (torch.cat(x) for x in zip(*parts))
        return SGFIOutput(losses.sum() / max(number, 1), alpha.detach(), self._tau().detach())

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        expected = (len(teacher), self.num_levels, *teacher.shape[2:])
        if (*student.shape[:2], *student.shape[3:]) != expected:
            raise ValueError(
                f"SGFI compares (N, {self.num_levels}, C_s, h, w) with (N, C, h, w), got "
                f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            )

    def _tau(self) -> Tensor:
        if self.num_levels == 1:
            return self.adapt.weight.new_ones(())
        return self.log_tau.clamp(*_LOG_TAU_RANGE).exp()

    def _row_losses(self, student: Tensor, teacher: Tensor) -> Tuple[Tensor, Tensor]:
        """(n,) mean squared differences and (n, L) weights."""
        adapted = self.adapt(student.flatten(0, 1)).unflatten(0, student.shape[:2])
        alpha = self._weights(adapted, teacher)
        with torch.autocast(student.device.type, enabled=False):
            # (n, 1, L) x (n, L, C h w), which keeps no product per level
            merged = alpha.unsqueeze(1) @ full_precision(adapted).flatten(2)
            difference = merged.squeeze(1) - teacher.flatten(1)
            return difference.square().mean(dim=1), alpha

    def _weights(self, adapted: Tensor, teacher: Tensor) -> Tensor:
        if self.num_levels == 1:
            return teacher.new_ones((len(teacher), 1))
        keys = self.embed(adapted.flatten(0, 1)).unflatten(0, adapted.shape[:2])
        reference = self.embed(teacher)
        with torch.autocast(teacher.device.type, enabled=False):
            logits = full_precision(keys) @ full_precision(reference).unsqueeze(2)
            return (logits.squeeze(2) / self._tau()).softmax(dim=1)
