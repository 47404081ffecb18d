import math

import pytest
import torch

from kd_d2.losses.soft_targets import (
    kl_divergence,
    soft_binary_cross_entropy,
    soft_cross_entropy,
)

LN2, LN3 = math.log(2), math.log(3)


def _t(*values):
    return torch.tensor(values, dtype=torch.float32)


class TestKL:
    @pytest.mark.parametrize(
        "student, teacher, temperature, reduction, expected",
        [
            ([LN2, 0, 0, 0], [0, 0, 0, 0], 1, "sum", 0.049857),
            ([0, 0, 0, 0], [LN2, 0, 0, 0], 1, "sum", 0.054115),
            ([LN2, 0, 0, 0], [0, 0, 0, 0], 1, "mean", 0.012464),
            ([LN2, 0, 0, 0], [0, 0, 0, 0], 10, "sum", 0.045556),
            ([LN2, 0, 0, 0], [0, 0, 0, 0], 10, "mean", 0.011389),
            ([0, 0], [0, LN3], 1, "sum", 0.130812),
            ([0, 0], [0, LN3], 1, "mean", 0.065406),
            ([0, 0], [0, LN3], 10, "mean", 0.075321),
            ([0, 0], [0, LN3], 2, "sum", 0.145363),
            ([0] * 17, [10] + [0] * 16, 10, "mean", 0.287843),
            ([0] * 17, [10] + [0] * 16, 1, "sum", 2.825228),
            ([0, 0, 0], [2, 0, 0], 2, "mean", 0.164379),
            ([0, 0, 0], [2, 0, 0], 1, "sum", 0.433040),
        ],
    )
    def test_worked_out(self, student, teacher, temperature, reduction, expected):
        out = kl_divergence(_t(*student), _t(*teacher), temperature, reduction)
        assert out.item() == pytest.approx(expected, abs=2e-6)

    def test_rows_are_separate_and_invariant_to_a_constant(self):
        student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
        out = kl_divergence(student, teacher)
        assert out.shape == (3, 4) and (out >= -1e-7).all()
        shift = torch.randn(3, 4, 1)
        torch.testing.assert_close(kl_divergence(student + shift, teacher), out)
        torch.testing.assert_close(kl_divergence(student[1], teacher[1]), out[1])

    def test_equal_logits(self):
        logits = 5 * torch.randn(100, 17)
        assert kl_divergence(logits, logits).abs().max() < 1e-6

    def test_gradient_is_the_difference_of_probabilities(self):
        student = torch.randn(2, 5, requires_grad=True)
        teacher = torch.randn(2, 5, requires_grad=True)
        kl_divergence(student, teacher, temperature=1.0).sum().backward()
        expected = (student.softmax(-1) - teacher.softmax(-1)).detach()
        torch.testing.assert_close(student.grad, expected)
        assert teacher.grad is None

    def test_extreme_and_half_precision_logits_are_finite(self):
        student = torch.tensor([[-200.0, 200.0]], dtype=torch.float16, requires_grad=True)
        out = kl_divergence(student, -student)
        out.sum().backward()
        assert out.dtype == torch.float32 and out.item() == pytest.approx(400)
        assert torch.isfinite(student.grad).all()

    def test_empty(self):
        student = torch.zeros(0, 17, requires_grad=True)
        out = kl_divergence(student, torch.zeros(0, 17))
        assert out.shape == (0,)
        out.sum().backward()

    def test_gradcheck(self):
        teacher = torch.randn(2, 3, dtype=torch.float64)
        student = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda s: kl_divergence(s, teacher, 2.0, "mean"), student)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"temperature": 0.0}, "temperature"),
            ({"bins_reduction": "none"}, "bins_reduction"),
            ({"teacher_logits": torch.zeros(2, 4)}, r"\(2, 3\) and \(2, 4\)"),
        ],
    )
    def test_wrong_arguments(self, arguments, message):
        arguments = {"teacher_logits": torch.zeros(2, 3), **arguments}
        with pytest.raises(ValueError, match=message):
            kl_divergence(torch.zeros(2, 3), **arguments)


class TestSoftBCE:
    @pytest.mark.parametrize("student, teacher, expected", [(0, LN3, LN2), (LN3, LN3, 0.562335)])
    def test_worked_out(self, student, teacher, expected):
        out = soft_binary_cross_entropy(_t(student), _t(teacher))
        assert out.tolist() == pytest.approx([expected], abs=1e-6)

    def test_weighted_sum_of_two_cells(self):
        # FRS: teacher scores (.8, .2) and (.1, .1), student (.4, .2) and (.1, .1), weights .8, .1
        student, teacher = (
            torch.logit(torch.tensor(p))
            for p in ([[0.4, 0.2], [0.1, 0.1]], [[0.8, 0.2], [0.1, 0.1]])
        )
        weights = torch.tensor([[0.8], [0.1]])
        total = (weights * soft_binary_cross_entropy(student, teacher)).sum() / weights.sum()
        assert total.item() == pytest.approx(1.259441, abs=1e-5)

    def test_gradient(self):
        student, teacher = torch.zeros(1, requires_grad=True), _t(LN3).requires_grad_()
        soft_binary_cross_entropy(student, teacher).sum().backward()
        assert student.grad.item() == pytest.approx(-0.25) and teacher.grad is None

    def test_half_precision_and_shapes(self):
        out = soft_binary_cross_entropy(torch.zeros(2).half(), torch.zeros(2).half())
        assert out.dtype == torch.float32
        with pytest.raises(ValueError, match="one shape"):
            soft_binary_cross_entropy(torch.zeros(2), torch.zeros(3))


class TestSoftCrossEntropy:
    def test_worked_out(self):
        teacher = _t(2, 0, 1)
        assert soft_cross_entropy(teacher, teacher).item() == pytest.approx(0.832396, abs=1e-6)
        uniform = soft_cross_entropy(torch.zeros(2, 3), teacher.expand(2, 3))
        assert uniform.tolist() == pytest.approx([LN3, LN3], abs=1e-6)
        # sum_c p_c log(1 / q_c), p = (3/4, 1/4), q = (1/4, 3/4)
        value = soft_cross_entropy(_t(0, LN3), _t(LN3, 0))
        assert value.item() == pytest.approx(0.75 * math.log(4) + 0.25 * math.log(4 / 3), abs=1e-6)

    def test_gradient_is_the_difference_of_probabilities(self):
        student = torch.randn(2, 5, requires_grad=True)
        teacher = torch.randn(2, 5, requires_grad=True)
        soft_cross_entropy(student, teacher).sum().backward()
        torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)))
        assert teacher.grad is None
        soft_cross_entropy(student, teacher, detach_targets=False).sum().backward()
        assert teacher.grad.abs().sum() > 0

    def test_half_precision_no_rows_and_shapes(self):
        low = torch.tensor([[-200.0, 200.0]], dtype=torch.float16)
        assert soft_cross_entropy(low, -low).tolist() == [400.0]
        assert soft_cross_entropy(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
        with pytest.raises(ValueError, match="one shape"):
            soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 4))
