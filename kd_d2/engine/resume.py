"""Exact resume: what a checkpoint must hold beside weights, and when it is put back.

At every checkpoint the state of each rank is gathered, and right afterwards the running job puts
its own state back and restarts its data loader at the current position. A job that resumes from
this checkpoint does the same two things, hence both continue identically: random numbers drawn
by evaluation in between, and samples that workers had prefetched, make no difference.
"""

import logging
from typing import Any, Dict

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from .random_state import capture_random_state, restore_random_state

__all__ = ["LoaderRestart", "RankStateSnapshot"]

logger = logging.getLogger(__name__)

# State that Detectron2 keeps in a plain attribute of dense detectors, outside the state dict:
# the moving average of the number of positive anchors.
_PLAIN_ATTRIBUTES = ("loss_normalizer",)


def _plain_state(student: nn.Module) -> Dict[str, float]:
    return {
        f"{path}:{name}": float(vars(module)[name])
        for path, module in student.named_modules()
        for name in _PLAIN_ATTRIBUTES
        if name in vars(module)
    }


def _restore_plain_state(student: nn.Module, state: Dict[str, float]) -> None:
    modules = dict(student.named_modules())
    for key, value in state.items():
        path, name = key.split(":")
        setattr(modules[path], name, value)


class _AtCheckpoints(HookBase):
    def __init__(self, period: int):
        """
        Args:
            period: SOLVER.CHECKPOINT_PERIOD.
        """
        self._period = period

    def _is_due(self) -> bool:
        """Same condition as ``PeriodicCheckpointer``."""
        return (self.trainer.iter + 1) % self._period == 0 or self._is_last()

    def _is_last(self) -> bool:
        return self.trainer.iter >= self.trainer.max_iter - 1


class RankStateSnapshot(_AtCheckpoints):
    """Gathers the state of all ranks; registered on every rank, before the checkpointer."""

    def after_step(self):
        if self._is_due():
            state = {
                "random": capture_random_state(),
                "plain": _plain_state(self.trainer.student),
            }
            self.trainer.rank_state = state
            self.trainer.rank_states = {
                "iteration": self.trainer.iter,
                "ranks": comm.gather(state),
            }


class LoaderRestart(_AtCheckpoints):
    """Puts the state back and restarts the loader; registered last, on every rank."""

    def before_train(self):
        saved: Dict[str, Any] = self.trainer.rank_states
        if self.trainer.start_iter == 0 or not saved:
            return
        ranks = saved["ranks"]
        if len(ranks) != comm.get_world_size():
            logger.warning(
                f"the checkpoint was written by {len(ranks)} processes, this run has "
                f"{comm.get_world_size()}: it continues, but not with the same random numbers"
            )
            self._restart(None)
            return
        self._restart(ranks[comm.get_rank()])

    def after_step(self):
        if self._is_due() and not self._is_last():
            self._restart(self.trainer.rank_state, self.trainer.iter + 1)

    def _restart(self, state, consumed=None):
        loader = self.trainer.data_loader
        loader.rewind(self.trainer.start_iter if consumed is None else consumed)
        self.trainer.restart_data_loader()
        if state is not None:
            _restore_plain_state(self.trainer.student, state["plain"])
            restore_random_state(state["random"])
