"""Rounds, percentiles, and what is attributed to which module."""

import torch
from torch import nn

from kd_d2.analysis import GroupTimer, interleaved, percentiles


def test_percentiles():
    assert percentiles(range(1, 102)) == {"p50": 51, "p90": 91, "p99": 100}
    # between two values: linearly
    assert percentiles([10.0, 20.0], which=(0, 25, 99)) == {"p0": 10, "p25": 12.5, "p99": 19.9}


class Clock:
    """Shows what parts have taken."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def take(self, seconds):
        self.now += seconds


def test_parts_take_turns_and_warmup_does_not_count():
    clock, calls = Clock(), []

    def part(name, durations):
        durations = iter(durations)

        def run():
            calls.append(name)
            clock.take(next(durations))

        return run

    parts = {"a": part("a", [9, 1, 2]), "b": part("b", [9, 3, 5])}
    times = interleaved(parts, rounds=2, warmup=1, clock=clock, progress=list)
    assert times == {"a": [1, 2], "b": [3, 5]}
    assert calls == ["a", "b"] * 3


class Slow(nn.Module):
    def __init__(self, clock, seconds, inner=None):
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, inner

    def forward(self, x):
        self.clock.take(self.seconds)
        return x if self.inner is None else self.inner(x)


def test_time_of_modules():
    clock = Clock()
    model = nn.Sequential()
    model.backbone = Slow(clock, 10, inner=Slow(clock, 3))
    model.head = Slow(clock, 0.5)
    x = torch.zeros(1)
    with GroupTimer(model, ["backbone", "backbone.inner", "head"], clock) as timer:
        for _ in range(2):
            model.backbone(x)
        clock.take(100)
        for _ in range(3):
            model.head(x)
        assert timer.reset() == {"backbone": 26, "backbone.inner": 6, "head": 1.5}
        model.head(x)
    assert timer.totals == {"backbone": 0, "backbone.inner": 0, "head": 0.5}
    model.head(x)  # nothing is watched any longer
    assert timer.totals["head"] == 0.5
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
