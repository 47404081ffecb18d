"""What is logged about alignment and mimicking besides losses."""

import contextlib
import logging
from typing import Dict, Iterator, List, Optional

import torch
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor

from .offsets import offset_statistics
from .s_head import MimicSHead

__all__ = ["Diagnostics", "StepRecord"]

logger = logging.getLogger(__name__)

# spatial standard deviation in cells below which offsets count as inert
_INERT = 0.01


class StepRecord:
    """Scalars of one step; does nothing where ``values`` is None."""

    def __init__(self, values: Optional[Dict[str, Tensor]]):
        self.values = values

    def offsets(self, head: MimicSHead, features: List[Tensor], deltas: List[Tensor]) -> None:
        """Size of the offsets and their spread over the cells, in cells.

        Only where a layer learns them: fixed ones say nothing.
        """
        if self.values is None or not any(x.learns_offsets for x in head.align.values()):
            return
        with torch.no_grad():
            statistics = offset_statistics(head.offsets(features, deltas))
        self.values["s_head/offset_rms"] = statistics["rms"]
        self.values["s_head/offset_spatial_std"] = statistics["spatial_std"]

    def cosines(self, distances: Dict[str, Tensor]) -> None:
        """Mean cosine of each mimic loss, of which ``distances`` has the unweighted 1 - cosine."""
        if self.values is None:
            return
        for name, distance in distances.items():
            self.values[name.replace("loss_mimic_", "mimicdet/cosine_")] = 1 - distance.detach()


class Diagnostics:
    """Writes scalars every few iterations, and warns of offsets that no box guides."""

    @configurable
    def __init__(self, *, period: int = 20, offset_warning_iter: int = 5000):
        """
        Args:
            period: iterations between two records; they cost some computation.
            offset_warning_iter: first iteration at which inert offsets are reported.

        Raises:
            ValueError: ``period`` is not positive.
        """
        if period < 1:
            raise ValueError(f"MODEL.MIMICDET.LOG_PERIOD must be positive, got {period}")
        self.period = period
        self.offset_warning_iter = offset_warning_iter
        self._warned = False

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.MIMICDET
        return {"period": node.LOG_PERIOD, "offset_warning_iter": node.OFFSET_WARNING_ITER}

    @staticmethod
    def is_due(period: int) -> bool:
        """Whether the current iteration is one of every ``period``; 0: never."""
        return period > 0 and get_event_storage().iter % period == 0

    @contextlib.contextmanager
    def step(self) -> Iterator[StepRecord]:
        """A record of the current step; what is in it at the end is written."""
        # the last of every period, when Detectron2's writers write
        due = (get_event_storage().iter + 1) % self.period == 0
        record = StepRecord({} if due else None)
        yield record
        if not record.values:
            return
        # one transfer for all of them
        numbers = torch.stack([value.float() for value in record.values.values()]).tolist()
        for name, number in zip(record.values, numbers):
            get_event_storage().put_scalar(name, number)
            if name == "s_head/offset_spatial_std":
                self._check_offsets(number)

    def _check_offsets(self, spatial_std: float) -> None:
        iteration = get_event_storage().iter
        if self._warned or iteration < self.offset_warning_iter or spatial_std >= _INERT:
            return
        self._warned = True
        logger.warning(
            f"the offsets of the S-head's alignment are nearly the same in all cells (spatial "
            f"standard deviation {spatial_std:.2g} cells at iteration {iteration}, less than "
            f"{_INERT}): they do not follow the adjusted boxes. Set "
            "MODEL.MIMICDET.S_HEAD.OFFSET_INIT to box and OFFSET_LR_FACTOR to 0.1, or "
            "OFFSET_INIT_STD to 0.1, and start again"
        )
