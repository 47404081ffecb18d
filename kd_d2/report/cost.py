"""Parameters, multiply-adds and latency of the runs' networks, as they are deployed."""

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import nn
from tqdm import tqdm

from kd_d2.analysis import (
    deployed,
    device_name,
    flop_analysis,
    image_size_of,
    interleaved,
    percentiles,
    random_batch,
)

from .run import Run

__all__ = ["Cost", "CostOptions", "Network", "network_of", "timed"]

# passes per network that count, and before them
ROUNDS, WARMUP = 20, 3


@dataclass(frozen=True)
class CostOptions:
    """How networks are measured.

    Args:
        image_size: height and width in pixels; None: what the config's test images have.
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

    figures: Mapping[str, float]
    note: str


class Network(NamedTuple):
    """A detector without what only training needs, an input, and what is known of its cost."""

    model: nn.Module
    inputs: List[Dict[str, Any]]
    device: str
    cost: Cost


@torch.no_grad()
def network_of(run: Run, options: CostOptions) -> Network:
    """Build the network of a run and count parameters and multiply-adds.

    With the run's weights, if there are some: they tell whether this is what was trained, and how
    many boxes go through NMS depends on them.

    Raises:
        ValueError, FileNotFoundError: the config does not describe a network of this version, or
            the checkpoint does not fit.
    """
    cfg = run.cfg
    height, width = options.image_size or image_size_of(cfg)
    model = deployed(cfg, run.checkpoint or "")
    inputs = random_batch(1, height, width, num_classes=1)
    figures = {
        "parameters, millions": sum(p.numel() for p in model.parameters()) / 1e6,
        "multiply-adds, 10⁹": flop_analysis(model, inputs).total() / 1e9,
    }
    note = f"one image of {height}×{width} pixels"
    if run.checkpoint is None:
        note += "; random weights, as there is no checkpoint"
    return Network(model, inputs, cfg.MODEL.DEVICE, Cost(figures, note))


@torch.no_grad()
def timed(networks: Mapping[Any, Network]) -> Dict[Any, Cost]:
    """The costs with latency: all networks run in turn, so that drift affects them alike."""
    calls = {
        str(key): lambda network=network: network.model(network.inputs)
        for key, network in networks.items()
    }
    times = interleaved(calls, ROUNDS, WARMUP, progress=lambda r: tqdm(r, desc="latency"))
    result = {}
    for key, network in networks.items():
        found = percentiles([1e3 * seconds for seconds in times[str(key)]])
        figures = {f"latency, ms, {name}": value for name, value in found.items()}
        threads = f", {torch.get_num_threads()} threads" if network.device == "cpu" else ""
        how = f"; {ROUNDS} passes on {device_name(network.device)}{threads}"
        cost = network.cost
        result[key] = replace(cost, figures={**cost.figures, **figures}, note=cost.note + how)
    return result
