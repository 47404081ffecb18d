"""Losses between class logits: the specification's numbers and torch's distributions."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence

from kd_d2.projects.dicod.kd_cls import (
    CLS_MODES,
    BinaryKL,
    ForegroundSoftmaxKL,
    SigmoidL1KL,
    SoftmaxKL,
)

TEACHER = torch.tensor([[3.0, 1.0, 0.0]])
OURS = [2.0, 0.0, -1.0]
SCORES = {
    "SoftmaxKL": "softmax",
    "ForegroundSoftmaxKL": "softmax",
    "BinaryKL": "sigmoid",
    "SigmoidL1KL": "sigmoid",
}
MODES = tuple(SCORES)
every_mode = pytest.mark.parametrize("name", MODES)


def value(mode, *logits, teacher=TEACHER):
    (found,) = mode(torch.tensor([logits]), teacher)
    return found.item()


def noise(name, rows=64, classes=80, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    extra = CLS_MODES.get(name).scores == "softmax"
    sizes = (rows, classes + extra), (rows, classes)
    ours, theirs = (3 * torch.randn(*s, generator=generator, dtype=dtype) for s in sizes)
    return ours.requires_grad_(), theirs


def test_registry():
    assert {name: mode.scores for name, mode in CLS_MODES} == SCORES


def test_softmax_values_and_gradient():
    assert value(SoftmaxKL(2.0), *OURS, 1.0) == pytest.approx(1.2918794, abs=1e-6)
    assert 0.4 * value(SoftmaxKL(2.0), *OURS, 1.0) == pytest.approx(0.5167518, abs=1e-6)
    assert value(SoftmaxKL(1.0), *OURS, 1.0) == pytest.approx(0.2703437, abs=1e-6)
    ours = torch.tensor([[*OURS, 1.0]], requires_grad=True)
    SoftmaxKL(2.0)(ours, TEACHER).sum().backward()
    expected = torch.tensor([[-0.346955, -0.127638, -0.077416, 0.552009]])
    torch.testing.assert_close(ours.grad, expected, rtol=0, atol=1e-6)


def test_softmax_with_the_teachers_classes_is_the_backgrounds_share():
    """-T^2 ln(1 - p_background), 0 only for a background that is far below."""
    found = [value(SoftmaxKL(2.0), 3.0, 1.0, 0.0, b) for b in (-40.0, -2.0, 0.0, 1.0)]
    assert found == pytest.approx([0.0, 0.2012246, 0.5249706, 0.8320347], abs=1e-6)
    flat = SoftmaxKL(2.0)(torch.zeros(2, 81), torch.zeros(2, 80))
    assert flat.tolist() == pytest.approx([0.0496901] * 2, abs=1e-6)
    assert 0.4 * flat[0].item() == pytest.approx(0.0198760, abs=1e-6)
    assert flat[0].item() == pytest.approx(4 * math.log(81 / 80), abs=1e-6)


def test_foreground_softmax_leaves_the_background_alone():
    """4 KL of (0.6285, 0.2312, 0.1402) and (0.3072, 0.5065, 0.1863)."""
    mode = ForegroundSoftmaxKL(2.0)
    found = [value(mode, 1.0, 2.0, 0.0, background) for background in (-9.0, 1.0, 9.0)]
    assert found == pytest.approx([0.9152826] * 3, abs=1e-6)
    assert value(mode, *OURS, 1.0) == pytest.approx(0, abs=1e-6)  # the teacher's, shifted by -1
    ours = torch.tensor([[1.0, 2.0, 0.0, 1.0]], requires_grad=True)
    mode(ours, TEACHER).sum().backward()
    expected = 2 * (torch.tensor([0.5, 1.0, 0.0]).softmax(0) - (TEACHER[0] / 2).softmax(0))
    torch.testing.assert_close(ours.grad[0, :3], expected, rtol=0, atol=1e-6)
    assert ours.grad[0, 3] == 0


def test_binary_values():
    assert value(BinaryKL(2.0), *OURS) == pytest.approx(0.1091538, abs=1e-6)
    assert value(BinaryKL(1.0), *OURS) == pytest.approx(0.0873245, abs=1e-6)
    assert value(BinaryKL(2.0), 3.0, 1.0, 0.0) == 0


def test_sigmoid_l1_values():
    assert value(SigmoidL1KL(2.0), *OURS) == pytest.approx(0.0099431, abs=1e-6)
    assert value(SigmoidL1KL(2.0), 4.0, 2.0, 1.0) == pytest.approx(0.0071260, abs=1e-6)
    assert value(SigmoidL1KL(2.0), 3.0, 1.0, 0.0) == pytest.approx(0.0, abs=1e-6)
    # far below 0 the sigmoid is exp: a shift is a common factor, which it does not see
    low = TEACHER - 40
    assert value(SigmoidL1KL(2.0), -36.0, -38.0, -39.0, teacher=low) == pytest.approx(0, abs=1e-6)
    assert value(BinaryKL(2.0), -36.0, -38.0, -39.0, teacher=low) > 0


def by_distributions(name, ours, theirs, t):
    """The formulas, written with torch's distributions."""
    if name == "SoftmaxKL":
        # background probability 0 for the teacher
        target = torch.cat([(theirs / t).softmax(1), torch.zeros_like(theirs[:, :1])], dim=1)
        return t**2 * kl_divergence(Categorical(target), Categorical(logits=ours / t))
    if name == "ForegroundSoftmaxKL":
        pair = Categorical(logits=theirs / t), Categorical(logits=ours[:, :-1] / t)
        return t**2 * kl_divergence(*pair)
    ours, theirs = (ours / t).sigmoid(), (theirs / t).sigmoid()
    if name == "BinaryKL":
        return t**2 * kl_divergence(Bernoulli(theirs), Bernoulli(ours)).sum(1) / ours.shape[1]
    # Categorical divides by the sum itself
    return t**2 * kl_divergence(Categorical(theirs), Categorical(ours))


@every_mode
@pytest.mark.parametrize("t", [1.0, 2.0, 3.5])
def test_random_logits(name, t):
    ours, theirs = noise(name)
    found = CLS_MODES.get(name)(t)(ours, theirs)
    (gradient,) = torch.autograd.grad(found.sum(), ours)
    expected = by_distributions(name, ours, theirs, t)
    (theirs_gradient,) = torch.autograd.grad(expected.sum(), ours)
    assert found.shape == (64,) and found.min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, theirs_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_gradients_of_the_specification(t):
    ours, theirs = noise("SoftmaxKL")
    (found,) = torch.autograd.grad(SoftmaxKL(t)(ours, theirs).sum(), ours)
    target = torch.cat([(theirs / t).softmax(1), torch.zeros(64, 1)], dim=1)
    torch.testing.assert_close(found, t * ((ours / t).softmax(1) - target))
    ours, theirs = noise("BinaryKL")
    (found,) = torch.autograd.grad(BinaryKL(t)(ours, theirs).sum(), ours)
    torch.testing.assert_close(found, t / 80 * ((ours / t).sigmoid() - (theirs / t).sigmoid()))


@every_mode
def test_targets_precision_and_no_rows(name):
    mode = CLS_MODES.get(name)()
    assert mode.temperature == 2
    ours, theirs = noise(name, dtype=torch.float32)
    theirs.requires_grad_()
    mode(ours, theirs).sum().backward()
    assert theirs.grad is None and ours.grad.abs().sum() > 0
    exact = mode(ours, theirs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mode(ours, theirs), exact)
        half = mode(ours.bfloat16(), theirs.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.05)
    # probabilities that vanish in fp32
    assert torch.isfinite(mode(ours * 1e4, theirs * 1e4)).all()
    ours.grad = None
    nothing = mode(ours[:0], theirs[:0])
    assert nothing.shape == (0,)
    nothing.sum().backward()
    assert torch.equal(ours.grad, torch.zeros_like(ours))


@every_mode
@pytest.mark.parametrize("t", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_that_are_none(name, t):
    with pytest.raises(ValueError, match=f"KD.DICOD.CLS.T must be positive and finite, got {t}"):
        CLS_MODES.get(name)(t)
