"""Parameters, multiply-adds and latency of the runs' networks."""

from dataclasses import dataclass
from typing import Dict, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.utils.analysis import FlopCountAnalysis

from kd_d2.engine.trainer import KDTrainer

from .run import Run

__all__ = ["Cost", "CostOptions", "image_size_of", "measured_cost"]


@dataclass(frozen=True)
class CostOptions:
    """How networks are measured.

    Args:
        image_size: height and width in pixels; None: see :func:`image_size_of`.
        latency: whether time is measured.
    """

    image_size: Optional[Tuple[int, int]] = None
    latency: bool = False


@dataclass(frozen=True)
class Cost:
    """Of one network on one image.

    Attributes:
        figures: what is measured, with its unit -> value.
        note: how.
    """

    figures: Dict[str, float]
    note: str


def image_size_of(cfg: CfgNode) -> Tuple[int, int]:
    """Height and width that a config's test images usually have, pixels.

    MIN_SIZE_TEST x MAX_SIZE_TEST, as a photograph fills them; a square where the latter is so large
    that it limits nothing.
    """
    short, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if short <= 0:
        return 800, 1333
    return (short, longest) if short <= longest <= 2 * short else (short, short)


@torch.no_grad()
def measured_cost(run: Run, options: CostOptions) -> Cost:
    """Build the run's network without its weights and measure it.

    Raises:
        ValueError, FileNotFoundError: the config does not describe a network of this version.
    """
    cfg = run.cfg
    height, width = options.image_size or image_size_of(cfg)
    model = KDTrainer.build_student(cfg).eval()
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    flops = FlopCountAnalysis(model, [{"image": image, "height": height, "width": width}])
    flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    parameters = sum(p.numel() for p in model.parameters())
    figures = {"parameters, millions": parameters / 1e6, "multiply-adds, 10⁹": flops.total() / 1e9}
    return Cost(figures, f"one image of {height}×{width} pixels")
