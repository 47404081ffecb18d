"""One-shot pruning: by part, and down to a complexity."""

import pytest
import torch

from kd_d2.projects.jointdetnas import parse
from kd_d2.projects.jointdetnas.search.pruning import _first, backbone_macs, prune, prune_to
from kd_d2.projects.jointdetnas.surgery import bottom_up_of
from tests.projects.jointdetnas.cases import BOTTLENECK, GROUPED, STEM, detections, student

SIZE = (96, 64)
FLOORS = {"floor": 0.1, "min_channels": 1}


def architecture(model):
    return bottom_up_of(model).architecture


@pytest.mark.parametrize("percent", [0.1, 0.2, 0.3])
def test_part(percent):
    model = student()
    pruned = prune(model, percent, **FLOORS)
    number = architecture(model).num_rankable_channels
    assert architecture(pruned).num_rankable_channels == number - round(percent * number)
    assert architecture(model) == parse(BOTTLENECK, STEM)
    detections(pruned)


@pytest.mark.parametrize("encoding", [BOTTLENECK, GROUPED])
def test_down_to_a_complexity(encoding):
    """One channel less would be too few: the result is the largest that fits."""
    model = student(encoding)
    whole = backbone_macs(architecture(model), SIZE)
    target = int(0.9 * whole)
    macs = backbone_macs(architecture(prune_to(model, target, SIZE, **FLOORS)), SIZE)
    assert macs <= target
    number = architecture(model).num_rankable_channels
    sizes = [
        backbone_macs(architecture(prune(model, (k + 0.25) / number, **FLOORS)), SIZE)
        for k in range(1, number // 2)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert macs == max(size for size in sizes if size <= target)


def test_complexities_that_cannot_be():
    model = student()
    whole = backbone_macs(architecture(model), SIZE)
    with pytest.raises(ValueError, match=f"no more than {whole:,} multiply-adds at 96x64 as it is"):
        prune_to(model, whole, SIZE, **FLOORS)
    with pytest.raises(ValueError, match="the floors leave at least .* more than 10"):
        prune_to(model, 10, SIZE, **FLOORS)
    with pytest.raises(ValueError, match=r"no channel of \[.* may be removed"):
        prune(model, 0.1, floor=0.0, min_channels=100)


def test_least_important_go_first():
    model = student()
    with torch.no_grad():
        norm = bottom_up_of(model).block_at((3, 1)).conv1.norm.weight
        norm[2] = 1e-6
    pruned = prune(model, 1 / architecture(model).num_rankable_channels, **FLOORS)
    kept = bottom_up_of(pruned).block_at((3, 1)).conv1.norm.weight
    assert torch.equal(kept, norm[[i for i in range(len(norm)) if i != 2]])


def test_bisection():
    for border in range(1, 20):
        assert _first(lambda n: n >= border, 1, 19) == border
