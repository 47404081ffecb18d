"""Peak memory of one detection, measured in a process that does nothing else."""

import multiprocessing
import os
import resource
import sys
from typing import Callable, Dict, NamedTuple, Tuple

import torch
from detectron2.config import CfgNode
from torch import nn

from .groups import by_group, module_groups
from .inputs import random_batch
from .network import deployed
from .timing import GroupTimer

__all__ = ["PeakMemory", "peak_memory"]


class PeakMemory(NamedTuple):
    """Bytes.

    Attributes:
        peak: on a GPU what the allocator handed out at most; on the CPU the largest resident set
            of the process minus that before the network was built. Weights included.
        model: weights and buffers by their size.
        groups: by how much the peak rose while the group ran; "rest": the network, and what rose
            outside of the groups. They add up to the peak.
    """

    peak: float
    model: float
    groups: Dict[str, float]


def peak_memory(
    build_cfg: Callable[[], CfgNode], image_size: Tuple[int, int], threads: int = 0
) -> PeakMemory:
    """Measure the first detection in an image, with random weights, in a fresh process.

    Args:
        build_cfg: returns the config; importable by name, with its arguments, in another process.
        image_size: height and width in pixels.
        threads: CPU threads; 0: torch's default.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return PeakMemory(*pool.apply(_measure, (build_cfg, image_size, threads)))


@torch.no_grad()
def _measure(build_cfg, image_size, threads) -> Tuple[float, float, Dict[str, float]]:
    if threads:
        torch.set_num_threads(threads)
    cfg = build_cfg()
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    # libraries allocate what they need once before anything is measured
    torch.nn.functional.conv2d(torch.ones(1, 8, 32, 32), torch.ones(8, 8, 3, 3))
    before = 0.0 if on_gpu else _resident()
    model = deployed(cfg)
    batch = random_batch(1, *image_size, num_classes=1)
    groups = module_groups(model)
    paths = [group.path for group in groups]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    read = torch.cuda.max_memory_allocated if on_gpu else _start_peak()
    with GroupTimer(model, paths, read) as growth:
        model(batch)
    peak = read() - before
    return peak, _size(model), by_group(groups, growth.totals, peak)


def _size(model: nn.Module) -> float:
    tensors = [*model.parameters(), *model.buffers()]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _resident() -> float:
    """Bytes of this process in memory; the most there ever were where the system says no more."""
    return _status("VmRSS") if os.path.exists("/proc/self/status") else _most_resident()


def _most_resident() -> float:
    # Linux counts in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _start_peak() -> Callable[[], float]:
    """A function that returns the largest resident set since now, or ever if need be."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak, see proc(5)
    except OSError:
        return _most_resident
    return lambda: _status("VmHWM")


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
