"""Seconds of calls and of the modules in them."""

import time
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

__all__ = ["CLOCKS", "GroupTimer", "interleaved", "percentiles", "synchronize"]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def synchronize() -> None:
    """Wait until the GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    parts: Dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 0,
    clock: Optional[Callable[[], float]] = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Dict[str, List[float]]:
    """Return the seconds of each part in each round.

    All parts run once in a round, so that drift of the machine affects them alike.

    Args:
        parts: name -> call.
        rounds: that count.
        warmup: rounds before them.
        clock: one of :data:`CLOCKS`; None: that of the wall.
        progress: wraps the iterable of rounds, as tqdm does.
    """
    clock = clock or time.perf_counter
    times: Dict[str, List[float]] = {name: [] for name in parts}
    for round_number in progress(range(warmup + rounds)):
        for name, run in parts.items():
            synchronize()
            start = clock()
            run()
            synchronize()
            if round_number >= warmup:
                times[name].append(clock() - start)
    return times


def percentiles(values: Sequence[float], which: Sequence[float] = (50, 90, 99)) -> Dict[str, float]:
    """Return "p50" etc. of the values, interpolated linearly between neighbours."""
    return {f"p{p:g}": float(np.percentile(values, p)) for p in which}


class GroupTimer:
    """Adds up, in every pass, the seconds that modules take: a context manager around passes.

    On a GPU it waits for the device before and after each of the modules, which makes a pass
    slower than one that is not watched.

    Args:
        model: whose modules are watched.
        paths: of the modules.
        read: what is added up; default: seconds.
    """

    def __init__(
        self, model: nn.Module, paths: Iterable[str], read: Callable[[], float] = time.perf_counter
    ):
        self._modules = {path: model.get_submodule(path) for path in paths}
        self._read = read
        self._handles: List[Any] = []
        self._started: List[Tuple[str, float]] = []
        self.totals: Dict[str, float] = {}
        self.reset()

    def reset(self) -> Dict[str, float]:
        """Begin at 0 again; return path -> what was added up since the last time."""
        before, self.totals = self.totals, {path: 0.0 for path in self._modules}
        return before

    def __enter__(self) -> "GroupTimer":
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._enter(path)))
            self._handles.append(module.register_forward_hook(self._leave(path)))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._started.clear()

    def _enter(self, path: str):
        def hook(module, inputs):
            synchronize()
            self._started.append((path, self._read()))

        return hook

    def _leave(self, path: str):
        def hook(module, inputs, output):
            synchronize()
            name, start = self._started.pop()
            assert name == path, f"{name} was entered last, but {path} ends"
            self.totals[path] += self._read() - start

        return hook
