"""When a distiller is active and how strongly, as a function of the iteration."""

import math
from dataclasses import dataclass
from typing import Callable, Dict

__all__ = ["DECAYS", "LossSchedule"]

# progress in [0, 1] -> factor in [0, 1]; "updown" (DeFeat) rises from 1 to 2 over the first quarter
DECAYS: Dict[str, Callable[[float], float]] = {
    "none": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "updown": lambda progress: min(1.0 + 4.0 * progress, 8.0 / 3.0 * (1.0 - progress)),
}


@dataclass(frozen=True)
class LossSchedule:
    """Factor of a distiller's loss at an iteration; stateless, hence safe to resume.

    Attributes:
        start_iter: first active iteration.
        end_iter: first iteration that is no longer active.
        warmup_iters: the factor grows as (i + 1) / (warmup_iters + 1) over the first
            ``warmup_iters`` active iterations, so that the first one is not wasted.
        decay: key of :data:`DECAYS`, applied between the end of the warm-up and ``end_iter``.

    Raises:
        ValueError: unknown decay, or an interval without iterations.
    """

    start_iter: int = 0
    end_iter: int = 2**62
    warmup_iters: int = 0
    decay: str = "none"

    def __post_init__(self):
        if self.decay not in DECAYS:
            raise ValueError(f"SCHEDULE.DECAY must be one of {sorted(DECAYS)}, got '{self.decay}'")
        if self.start_iter < 0 or self.warmup_iters < 0:
            raise ValueError(
                "SCHEDULE.START_ITER and SCHEDULE.WARMUP_ITERS must not be negative, got "
                f"{self.start_iter} and {self.warmup_iters}"
            )
        if self.end_iter <= self.start_iter:
            raise ValueError(
                f"SCHEDULE.END_ITER ({self.end_iter}) must be larger than START_ITER "
                f"({self.start_iter}), or -1 for the whole run"
            )

    @classmethod
    def from_node(cls, node, max_iter: int) -> "LossSchedule":
        """Build from a ``SCHEDULE`` node; END_ITER -1 stands for ``max_iter``."""
        end_iter = node.END_ITER if node.END_ITER >= 0 else max(max_iter, node.START_ITER + 1)
        return cls(node.START_ITER, end_iter, node.WARMUP_ITERS, node.DECAY)

    def __call__(self, iteration: int) -> float:
        """Return the factor at ``iteration`` (0-based), in [0, 1], or [0, 2] for "updown"."""
        if not self.start_iter <= iteration < self.end_iter:
            return 0.0
        active = iteration - self.start_iter
        if active < self.warmup_iters:
            return (active + 1) / (self.warmup_iters + 1)
        length = self.end_iter - self.start_iter - self.warmup_iters
        return DECAYS[self.decay]((active - self.warmup_iters) / length)
