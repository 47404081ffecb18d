"""Parameters, multiply-adds and latency of the runs' networks."""

from dataclasses import dataclass
from typing import Optional, Tuple

from .run import Run

__all__ = ["Cost", "CostOptions", "measured_cost"]


@dataclass(frozen=True)
class CostOptions:
    """How networks are measured.

    Args:
        image_size: height and width in pixels.
        latency: whether time is measured.
    """

    image_size: Tuple[int, int] = (800, 1344)
    latency: bool = False


@dataclass(frozen=True)
class Cost:
    """Of one network on one image."""

    parameters: int
    gflops: Optional[float] = None


def measured_cost(run: Run, options: CostOptions) -> Cost:
    raise ValueError("TODO")
