"""Detectron2's training steps with one addition: all ranks notice a broken loss, and name it."""

from typing import Mapping

import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm

__all__ = ["CheckedAMPTrainer", "CheckedSimpleTrainer", "check_finite"]


def check_finite(losses: Mapping[str, torch.Tensor], iteration: int) -> None:
    """Raise on every rank if a loss of any rank is NaN or infinite.

    Detectron2 raises on rank 0 only, and the others die of a lost connection.

    Raises:
        FloatingPointError: names the losses, the iteration and the values on this rank.
    """
    names = list(losses)
    values = torch.stack([losses[name].detach().float() for name in names])
    broken = (~torch.isfinite(values)).to(torch.uint8)
    if comm.get_world_size() > 1:
        dist.all_reduce(broken, op=dist.ReduceOp.MAX)
    broken = broken.tolist()
    if any(broken):
        here = dict(zip(names, values.tolist()))
        listed = ", ".join(f"{n} (here {here[n]})" for n, bad in zip(names, broken) if bad)
        raise FloatingPointError(
            f"NaN or infinite loss at iteration {iteration}: {listed}. Seen on rank "
            f"{comm.get_rank()} of {comm.get_world_size()}; all losses of this rank: {here}"
        )


class _CheckedMetrics:
    """Checks before Detectron2 gathers the metrics, i.e. before the optimizer's step."""

    def _write_metrics(self, loss_dict, data_time, prefix="", iter=None):
        check_finite(loss_dict, self.iter if iter is None else iter)
        super()._write_metrics(loss_dict, data_time, prefix, iter)


class CheckedSimpleTrainer(_CheckedMetrics, SimpleTrainer):
    """``SimpleTrainer`` with :func:`check_finite`."""


class CheckedAMPTrainer(_CheckedMetrics, AMPTrainer):
    """``AMPTrainer`` with :func:`check_finite`."""
