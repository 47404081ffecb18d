"""SKD's SSIM against constants, a naive loop and its definition."""

import math

import numpy as np
import pytest
import torch

from kd_d2.baselines import SKD
from kd_d2.blocks import structural_similarity
from tests.baselines.feature_cases import ToyContext, kd_model, neck_keys, networks


def _naive(x, y, data_range=1.0):
    """SSIM of two (H, W) arrays, cell by cell, on mirrored borders."""
    height, width = x.shape
    pad = [np.pad(z, 5, mode="reflect") for z in (x, y)]
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(line, line)
    window /= window.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    result = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            a, b = (z[i : i + 11, j : j + 11] for z in pad)
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cov = (window * (a - ma) * (b - mb)).sum()
            result[i, j] = (2 * ma * mb + c1) * (2 * cov + c2)
            result[i, j] /= (ma**2 + mb**2 + c1) * (va + vb + c2)
    return result


@pytest.mark.parametrize("size", [(16, 13), (7, 6), (3, 4), (1, 2), (1, 1)])
@pytest.mark.parametrize("data_range", [1.0, 4.0])
def test_against_a_loop(size, data_range):
    """Also for maps that are smaller than the window (numpy mirrors repeatedly, too)."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 3, *size)
    found = structural_similarity(x, y, data_range)
    for c in range(3):
        expected = _naive(*(z[0, c].double().numpy() for z in (x, y)), data_range)
        np.testing.assert_allclose(found[0, c].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_constant_and_equal_maps():
    x, y = torch.full((1, 1, 8, 8), 0.2), torch.full((1, 1, 8, 8), 0.6)
    np.testing.assert_allclose(structural_similarity(x, y).numpy(), 0.600100, atol=1e-6)
    z = torch.randn(2, 3, 9, 9) * 100 + 50
    np.testing.assert_allclose(structural_similarity(z, z).numpy(), 1.0, atol=1e-5)


def test_large_values_keep_their_digits():
    """Features of a hundred that vary by a hundredth."""
    torch.manual_seed(1)
    x, y = 100 + 0.01 * torch.randn(2, 1, 1, 12, 12, dtype=torch.float64)
    found = structural_similarity(x.float(), y.float())
    expected = _naive(x[0, 0].numpy(), y[0, 0].numpy())
    np.testing.assert_allclose(found[0, 0].numpy(), expected, atol=2e-2)


def test_loss_of_constant_maps():
    """(1 - 0.600100) / 2 = 0.199950, summed over the levels."""
    keys = neck_keys(2, (8, 16))
    distiller = SKD(student_keys=keys, teacher_keys=keys, weight=4.0)
    maps = [torch.full((1, 2, n, n), 0.2) for n in (8, 4)], [
        torch.full((1, 2, n, n), 0.6) for n in (8, 4)
    ]
    ctx = ToyContext({"neck": maps[0]}, {"neck": maps[1]})
    assert distiller(ctx)["feat"].item() == pytest.approx(4 * 2 * 0.199950, abs=1e-5)


def test_gradient():
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 1, 4, 3, dtype=torch.float64)
    x.requires_grad_(True)
    # the centres are constants by construction: the value does not depend on them
    assert torch.autograd.gradcheck(lambda z: structural_similarity(z, y), (x,), atol=1e-6)


def test_adapters():
    student, teacher = networks(**{"MODEL.FPN.OUT_CHANNELS": 64})
    layers = kd_model("SKD", student, teacher).distillers["skd"].pair_terms["feat"].adapter.layers
    assert [tuple(conv.weight.shape) for conv in layers] == [(64, 32, 1, 1)] * 5
    distiller = kd_model("SKD", *networks()).distillers["skd"]
    assert not list(distiller.parameters()) and distiller.weights == {"feat": 4.0}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"DATA_RANGE": 0.0}, "KD.SKD.DATA_RANGE must be positive, got 0.0"),
        ({"ADAPTER": "fc"}, "KD.SKD.ADAPTER must be one of .*'fc'"),
        ({"DATA_RANGE": math.nan}, "KD.SKD.DATA_RANGE must be positive, got nan"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        kd_model("SKD", *networks(), **options)
