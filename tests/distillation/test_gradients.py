"""Gradient norms and cosines against closed forms."""

import math

import pytest
import torch

from kd_d2.distillation import compare_gradients, gradient_norms


def test_norms_of_a_polynomial():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    w = torch.tensor(2.0, requires_grad=True)
    losses = {"square": w * (x**2).sum(), "sum": x.sum(), "constant": torch.tensor(5.0)}
    norms = gradient_norms(losses, {"x": [x], "w": [w], "both": [x, w], "none": []})
    # d/dx = 2 w x = (12, 16), d/dw = |x|^2 = 25
    expected = {
        "square": {"x": 20.0, "w": 25.0, "both": (20.0**2 + 25.0**2) ** 0.5, "none": 0.0},
        "sum": {"x": 2**0.5, "w": 0.0, "both": 2**0.5, "none": 0.0},
        "constant": {"x": 0.0, "w": 0.0, "both": 0.0, "none": 0.0},
    }
    assert norms == {k: pytest.approx(v, rel=1e-6) for k, v in expected.items()}
    assert x.grad is None and w.grad is None
    losses["square"].backward()  # the graph is still there
    assert w.grad == 25.0


def test_derivatives_are_total():
    p6 = torch.tensor([1.0, 2.0], requires_grad=True)
    p7 = 3 * p6
    norms = gradient_norms({"loss": p7.sum()}, {"p6": [p6], "p7": [p7]})
    assert norms["loss"] == pytest.approx({"p6": 3 * 2**0.5, "p7": 2**0.5})


def test_what_is_not_finite_is_told_and_half_precision_does_not_overflow():
    x = torch.zeros(2, requires_grad=True)
    norms = gradient_norms({"nan": x.sqrt().sum() * 0, "inf": x.sqrt().sum()}, {"x": [x]})
    assert norms["inf"]["x"] == float("inf") and norms["nan"]["x"] != norms["nan"]["x"]
    half = torch.ones(4, dtype=torch.float16, requires_grad=True)
    norms = gradient_norms({"big": (half * 6e4).float().sum()}, {"half": [half]})
    assert norms["big"]["half"] == pytest.approx(2 * 6e4, rel=1e-3)  # its square is no fp16


def test_cosines_with_a_reference():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    y = torch.tensor(1.0, requires_grad=True)
    losses = {
        "along": 2 * x[0] + 0 * y,  # (2, 0), 0
        "reference": x[0] + x[1],  # (1, 1), none
        "against": y - (x**2).sum(),  # (-6, -8), 1
        "across": x[0] - x[1],  # (1, -1), none
        "constant": torch.tensor(1.0),
    }
    found = compare_gradients(losses, {"x": [x], "all": [x, y]}, "reference")
    assert list(found) == list(losses)
    assert found["along"]["x"] == pytest.approx((2.0, 2**-0.5))
    assert found["reference"]["x"] == pytest.approx((2**0.5, 1.0))
    assert found["against"]["x"] == pytest.approx((10.0, -14 / (10 * 2**0.5)))
    # what the reference does not depend on makes the angle larger
    assert found["against"]["all"] == pytest.approx((101**0.5, -14 / (101 * 2) ** 0.5))
    assert found["across"]["x"] == pytest.approx((2**0.5, 0.0), abs=1e-7)
    assert found["constant"]["x"].norm == 0 and math.isnan(found["constant"]["x"].cosine)
    assert {n: g["x"].norm for n, g in found.items()} == pytest.approx(
        {n: g["x"] for n, g in gradient_norms(losses, {"x": [x]}).items()}
    )
