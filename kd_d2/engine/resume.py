"""Exact resume: what a checkpoint must hold beside weights, and when it is put back.

At every checkpoint the state of each rank is gathered, and right afterwards the running job puts
its own state back and restarts its data loader at the current position. A job that resumes from
this checkpoint does the same two things, hence both continue identically: random numbers drawn
by evaluation in between, and samples that workers had prefetched, make no difference.
"""

import logging
from typing import Any, Dict, List, Optional

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PreciseBN
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss_jit
from torch import nn

from .random_state import capture_random_state, restore_random_state

__all__ = [
    "LoaderRestart",
    "RankStateSnapshot",
    "RestartedPreciseBN",
    "settle_scripted_losses",
]

logger = logging.getLogger(__name__)

# State that Detectron2 keeps in a plain attribute of dense detectors, outside the state dict:
# the moving average of the number of positive anchors.
_PLAIN_ATTRIBUTES = ("loss_normalizer",)
# Detectron2's writers print and store medians over so many iterations.
_WINDOW = 20


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


def settle_scripted_losses(student: nn.Module) -> None:
    """Bring TorchScript functions of Detectron2 to where they are after their first call.

    A process runs the focal loss of RetinaNet and FCOS once as written and from then on as an
    optimised graph, whose gradients differ in the last bits. An uninterrupted run is past that.
    """
    alpha = getattr(student, "focal_loss_alpha", None)
    if alpha is None:
        return
    logits = torch.zeros((2, 2), device=student.device, requires_grad=True)
    targets = torch.zeros_like(logits, requires_grad=False)
    with torch.enable_grad():
        loss = sigmoid_focal_loss_jit(
            logits, targets, alpha=alpha, gamma=student.focal_loss_gamma, reduction="sum"
        )
        loss.backward()


def _curves(storage: EventStorage) -> Dict[str, List[float]]:
    """The last values of all scalars that are put in every iteration."""
    result = {}
    for name, smoothed in storage.smoothing_hints().items():
        values = storage.history(name).values()[-_WINDOW:]
        consecutive = [iteration for _, iteration in values]
        if smoothed and consecutive == list(
            range(storage.iter - len(values) + 1, storage.iter + 1)
        ):
            result[name] = [value for value, _ in values]
    return result


def _restore_curves(storage: EventStorage, curves: Dict[str, List[float]], start: int) -> None:
    for name, values in curves.items():
        for iteration, value in enumerate(values, start - len(values)):
            storage.put_scalar(name, value, cur_iter=iteration)


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
                "curves": _curves(self.trainer.storage),
            }
            self.trainer.rank_state = state
            self.trainer.rank_states = {
                "iteration": self.trainer.iter,
                "ranks": comm.gather(state),
            }


class LoaderRestart(_AtCheckpoints):
    """Puts the state back and restarts the loader; registered last, on every rank."""

    def before_train(self):
        start = self.trainer.start_iter
        if start == 0:
            return
        settle_scripted_losses(self.trainer.student)
        ranks = self.trainer.rank_states.get("ranks") or []
        if len(ranks) == comm.get_world_size():
            state = ranks[comm.get_rank()]
            _restore_curves(self.trainer.storage, state["curves"], start)
            self._restart(start, state)
            return
        if ranks:
            logger.warning(
                f"the checkpoint was written by {len(ranks)} processes, this run has "
                f"{comm.get_world_size()}: it continues, but not with the same random numbers"
            )
            _restore_plain_state(self.trainer.student, ranks[0]["plain"])
        else:
            logger.warning(
                "the checkpoint holds no random state: the run continues, but not with the random "
                "numbers of an uninterrupted one"
            )
        self._restart(start)

    def after_step(self):
        if self._is_due() and not self._is_last():
            self._restart(self.trainer.iter + 1, self.trainer.rank_state)

    def _restart(self, batches_consumed: int, state: Optional[Dict[str, Any]] = None) -> None:
        self.trainer.data_loader.rewind(batches_consumed)
        self.trainer.restart_data_loader()
        if state is not None:
            _restore_plain_state(self.trainer.student, state["plain"])
            restore_random_state(state["random"])


class RestartedPreciseBN(PreciseBN):
    """``PreciseBN`` that sees the same images every time, instead of ever new ones.

    Where its stream stands is thereby no state that a checkpoint would have to hold.
    """

    def update_stats(self):
        self._data_iter = None
        super().update_stats()
