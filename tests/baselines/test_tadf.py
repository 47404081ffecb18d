"""TADF: the Gaussian of a box, its divisor and its switches."""

import math

import pytest
import torch

from kd_d2.baselines import TADF
from tests.baselines.feature_cases import ToyContext, kd_model, level_keys, networks

# 4x4 cells in the upper left corner of a 6x6 map
BOX = (0, 0, 32, 32)


def _raw(**options):
    """Unweighted loss of a student that is above the teacher by 1 in cell (0, 0), both channels."""
    keys = level_keys()
    distiller = TADF(student_keys=keys, teacher_keys=keys, **options)
    torch.nn.init.dirac_(distiller.pair_terms["feat"].adapter.layers[0].weight)
    student = torch.zeros(1, 2, 6, 6)
    student[:, :, 0, 0] = 1.0
    teacher = torch.zeros(1, 2, 6, 6)
    ctx = ToyContext({"neck.p3": student}, {"neck.p3": teacher}, [[BOX]], (48, 48))
    distiller(ctx)
    return ctx.raw["tadf/feat"].item()


def _bell(shift=0.0):
    line = [math.exp(-0.5 * ((x + shift - 2) / 2) ** 2) for x in range(4)]
    return [[a * b for a in line] for b in line]


def test_worked_out():
    """Row 0 of the mask is .36788 .53526 .60653 .53526; twice the sum of all divides."""
    bell = _bell()
    assert bell[0] == pytest.approx([0.36788, 0.53526, 0.60653, 0.53526], abs=1e-5)
    total = sum(map(sum, bell))
    assert _raw() == pytest.approx(2 * 0.36788 / (2 * total), rel=1e-4)


def test_switches():
    centred = _bell(0.5)
    expected = 2 * centred[0][0] / (2 * sum(map(sum, centred)))
    assert _raw(center_cell=True) == pytest.approx(expected, rel=1e-4)
    assert _raw(normalizer="count") == pytest.approx(2 * 0.36788 / (16 * 2), rel=1e-4)


def test_no_object():
    keys = level_keys()
    distiller = TADF(student_keys=keys, teacher_keys=keys)
    maps = {"neck.p3": torch.ones(1, 2, 6, 6)}
    assert distiller(ToyContext(maps, {"neck.p3": torch.zeros(1, 2, 6, 6)}))["feat"].item() == 0.0


def test_a_value_that_cannot_work():
    with pytest.raises(ValueError, match="KD.TADF.NORMALIZER must be one of .*'images'"):
        kd_model("TADF", *networks(), NORMALIZER="images")
