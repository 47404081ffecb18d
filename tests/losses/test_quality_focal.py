"""Quality focal loss against the values of crosskd.md, section 8."""

import math

import pytest
import torch

from kd_d2.losses import quality_focal
from kd_d2.losses.quality_focal import quality_focal_loss, quality_focal_loss_per_row

LN3 = math.log(3.0)


def _value_and_gradient(logit, target_logit, gamma):
    logit = torch.tensor([logit], requires_grad=True)
    target = torch.tensor([target_logit]).sigmoid()
    loss = quality_focal_loss(logit, target, gamma, reduction="sum")
    loss.backward()
    return loss.item(), logit.grad.item()


@pytest.mark.parametrize(
    "logit, target_logit, gamma, value, gradient",
    [
        (0.0, LN3, 1.0, 0.173287, -0.235787),
        (LN3, 0.0, 1.0, 0.209247, 0.219435),
        (-math.log(99.0), 0.0, 1.0, 1.130729, None),
        (2.0, -3.0, 1.0, 1.693474, None),
        (0.0, 0.0, 1.0, 0.0, 0.0),
        (0.0, LN3, 2.0, 0.043322, None),
        (0.0, LN3, 0.0, 0.693147, -0.25),
    ],
)
def test_values_worked_out_by_hand(logit, target_logit, gamma, value, gradient):
    computed, slope = _value_and_gradient(logit, target_logit, gamma)
    assert computed == pytest.approx(value, abs=2e-6)
    if gradient is not None:
        assert slope == pytest.approx(gradient, abs=2e-6)


def test_one_positive_class_with_iou_as_target():
    loss = quality_focal_loss(torch.zeros(1, 2), torch.tensor([[0.8, 0.0]]), 2.0, "sum")
    assert loss.item() == pytest.approx(0.235670, abs=2e-6)


def test_hard_targets_give_the_unbalanced_focal_loss():
    torch.manual_seed(0)
    logits, targets = torch.randn(50), torch.randint(0, 2, (50,)).float()
    p_true = torch.where(targets > 0, logits.sigmoid(), 1 - logits.sigmoid())
    expected = -((1 - p_true) ** 2) * p_true.log()
    torch.testing.assert_close(quality_focal_loss(logits, targets, 2.0), expected)


def test_mirrored_inputs_give_the_same_loss():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 5), torch.rand(4, 5)
    mirrored = quality_focal_loss(-logits, 1 - targets, 2.0)
    torch.testing.assert_close(quality_focal_loss(logits, targets, 2.0), mirrored)


def test_reductions_and_empty_input():
    logits, targets = torch.randn(3, 4), torch.rand(3, 4)
    per_element = quality_focal_loss(logits, targets)
    assert per_element.shape == (3, 4)
    torch.testing.assert_close(
        quality_focal_loss(logits, targets, reduction="sum"), per_element.sum()
    )
    torch.testing.assert_close(
        quality_focal_loss(logits, targets, reduction="mean"), per_element.mean()
    )
    empty = torch.zeros(0, 4, requires_grad=True)
    for reduction in ("mean", "sum"):
        loss = quality_focal_loss(empty, torch.zeros(0, 4), reduction=reduction)
        assert loss.item() == 0 and loss.requires_grad


def test_no_gradient_to_targets_and_fp32_under_autocast():
    logits = torch.randn(6, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.rand(6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = quality_focal_loss(logits, targets)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert logits.grad.dtype == torch.bfloat16 and targets.grad is None


def test_extreme_logits_stay_finite():
    logits = torch.tensor([-200.0, 200.0], requires_grad=True)
    quality_focal_loss(logits, torch.tensor([1.0, 0.0]), 2.0, "sum").backward()
    assert torch.isfinite(logits.grad).all()


def test_user_errors_name_the_values():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        quality_focal_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="0.5"):
        quality_focal_loss(torch.zeros(2), torch.zeros(2), gamma=0.5)
    with pytest.raises(ValueError, match="avg"):
        quality_focal_loss(torch.zeros(2), torch.zeros(2), reduction="avg")


class TestPerRow:
    """The loss of distillation: value and gradient in one go, in blocks."""

    @pytest.fixture(autouse=True, params=[1, 20, 2**17])
    def block(self, request, monkeypatch):
        """One row at a time, four rows of five classes (the last block is smaller), all at once."""
        monkeypatch.setattr(quality_focal, "_BLOCK", request.param)

    @staticmethod
    def _inputs(dtype=torch.float32, scale=4.0):
        generator = torch.Generator().manual_seed(0)
        x, t = scale * torch.randn((2, 3, 7, 5), generator=generator, dtype=torch.float64)
        x[0, 0], t[0, 1, 0] = t[0, 0], x[0, 1, 0]  # where the gradient has a corner
        return x.to(dtype).requires_grad_(), t.to(dtype)

    @pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0])
    def test_is_the_sum_of_the_elementwise_loss(self, gamma):
        x, t = self._inputs()
        weights = torch.linspace(0, 2, 21).view(3, 7)
        ours = quality_focal_loss_per_row(x, t, gamma)
        theirs = quality_focal_loss(x, t.sigmoid(), gamma).sum(dim=-1)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
        assert gamma == 0 or torch.equal(gradients[0][0, 0], torch.zeros(5))

    @pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0])
    def test_gradient_against_finite_differences(self, gamma):
        x, t = self._inputs(torch.float64, scale=2.0)
        x, t = x[1:].detach().requires_grad_(), t[1:]  # away from the corners
        assert torch.autograd.gradcheck(lambda x: quality_focal_loss_per_row(x, t, gamma), x)

    def test_backward_may_run_twice(self):
        x, t = self._inputs()
        loss = quality_focal_loss_per_row(x, t, 1.0).sum()
        first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        x, t = self._inputs(dtype)
        loss = quality_focal_loss_per_row(x, t, 1.0)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(
            loss, quality_focal_loss(x, t.float().sigmoid(), 1.0).sum(dim=-1), rtol=1e-6, atol=1e-6
        )
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.dtype == dtype and torch.isfinite(gradient).all()

    def test_memory_formats_and_extreme_logits(self):
        x = torch.tensor([-200.0, -50.0, 0.0, 50.0, 200.0]).repeat(5, 1)
        t = x.t().requires_grad_()  # not contiguous, and a constant all the same
        x = x.clone().requires_grad_()
        loss = quality_focal_loss_per_row(x, t, 1.0)
        torch.testing.assert_close(loss, quality_focal_loss(x, t.sigmoid(), 1.0).sum(dim=-1))
        loss.sum().backward()
        assert torch.isfinite(x.grad).all() and t.grad is None

    def test_empty_input_is_connected(self):
        for shape in ((0, 5), (2, 0, 5), (2, 0)):
            x = torch.zeros(shape, requires_grad=True)
            loss = quality_focal_loss_per_row(x, x.detach(), 1.0)
            assert loss.shape == shape[:-1]
            loss.sum().backward()
            assert x.grad.shape == shape

    def test_without_gradients_nothing_is_kept(self):
        x, t = self._inputs()
        assert not quality_focal_loss_per_row(x.detach(), t, 1.0).requires_grad

    def test_user_errors(self):
        x = torch.zeros(2, 3)
        with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
            quality_focal_loss_per_row(x, x.t(), 1.0)
        with pytest.raises(ValueError, match="0.5"):
            quality_focal_loss_per_row(x, x, 0.5)
