"""Distribution focal loss."""

import math

import pytest
import torch

from kd_d2.losses.distribution import distribution_focal_loss


def test_value_worked_out_by_hand():
    logits = torch.tensor([[0.0, 0.0, math.log(2.0), 0.0]])
    loss = distribution_focal_loss(logits, torch.tensor([2.3]), "sum")
    assert loss.item() == pytest.approx(0.7 * math.log(2.5) + 0.3 * math.log(5.0), abs=1e-6)
    assert loss.item() == pytest.approx(1.124235, abs=2e-6)


def test_integer_target_is_cross_entropy():
    torch.manual_seed(0)
    logits, bins = torch.randn(20, 8), torch.randint(0, 7, (20,))
    expected = torch.nn.functional.cross_entropy(logits, bins, reduction="none")
    torch.testing.assert_close(distribution_focal_loss(logits, bins.float()), expected)


def test_minimum_is_the_split_between_the_two_neighbours():
    logits = torch.full((1, 5), -30.0)
    logits[0, 1], logits[0, 2] = math.log(0.75), math.log(0.25)
    logits.requires_grad_(True)
    loss = distribution_focal_loss(logits, torch.tensor([1.25]), "sum")
    loss.backward()
    assert logits.grad.abs().max() < 1e-6
    assert loss.item() == pytest.approx(0.562335, abs=1e-5)


def test_shift_of_all_logits_changes_nothing():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 4, 6), torch.rand(3, 4) * 4.9
    loss = distribution_focal_loss(logits, targets)
    assert loss.shape == (3, 4)
    torch.testing.assert_close(distribution_focal_loss(logits + 5, targets), loss)


def test_reductions_empty_input_precision():
    logits, targets = torch.randn(7, 4), torch.rand(7) * 3
    loss = distribution_focal_loss(logits, targets)
    torch.testing.assert_close(distribution_focal_loss(logits, targets, "mean"), loss.mean())
    empty = torch.zeros(0, 4, 5, requires_grad=True)
    for reduction in ("mean", "sum"):
        value = distribution_focal_loss(empty, torch.zeros(0, 4), reduction)
        assert value.item() == 0 and value.requires_grad
    targets.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        half = distribution_focal_loss(logits.bfloat16().requires_grad_(True), targets)
    assert half.dtype == torch.float32
    half.sum().backward()
    assert targets.grad is None


def test_user_errors_name_the_values():
    with pytest.raises(ValueError, match=r"\(2, 4, 5\) and \(2, 3\)"):
        distribution_focal_loss(torch.zeros(2, 4, 5), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="avg"):
        distribution_focal_loss(torch.zeros(2, 5), torch.zeros(2), "avg")
