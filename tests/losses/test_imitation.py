import math

import pytest
import torch

from kd_d2.losses.imitation import align_statistics, pkd_loss, standardise


def _map(values):
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


def _random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestPKD:
    def test_affine_maps_cost_nothing(self):
        teacher = _random(2, 3, 4, 5, dtype=torch.float64)
        scale = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64).reshape(1, 3, 1, 1)
        assert pkd_loss(scale * teacher + 3.0, teacher).item() < 1e-11

    def test_opposite_maps(self):
        teacher = _random(2, 3, 4, 5)  # m = 40: 2 * 39 / 40
        assert pkd_loss(-teacher, teacher).item() == pytest.approx(1.95, abs=1e-5)

    @pytest.mark.parametrize(
        "student, teacher, expected",
        [
            ([1, 3, 2, 4], [1, 2, 3, 4], 0.15),
            ([5, 5, 5, 5], [1, 2, 3, 4], 0.375),
            ([0, 1, 2, 3], [0, 0, 4, 4], 0.079180),
        ],
    )
    def test_worked_out(self, student, teacher, expected):
        assert pkd_loss(_map(student), _map(teacher)).item() == pytest.approx(expected, abs=1e-6)

    def test_statistics_are_of_the_batch(self):
        t = _map([1, 2, 3, 4])
        teacher, student = torch.cat([t, 10 * t + 5]), torch.cat([3 * t, t])
        assert pkd_loss(student[:1], teacher[:1]).item() < 1e-6
        assert pkd_loss(student, teacher).item() == pytest.approx(1.284091, abs=1e-6)

    def test_gradient_reaches_the_student_only(self):
        student = _random(2, 3, 4, 5).requires_grad_()
        teacher = _random(2, 3, 4, 5, seed=1).requires_grad_()
        pkd_loss(student, teacher).backward()
        assert student.grad.abs().sum() > 0 and teacher.grad is None
        # The loss does not change with the student's mean, nor with its scale.
        torch.testing.assert_close(student.grad.sum((0, 2, 3)), torch.zeros(3), atol=1e-7, rtol=0)

    def test_gradcheck(self):
        student = _random(2, 2, 2, 3, dtype=torch.float64).requires_grad_()
        teacher = _random(2, 2, 2, 3, seed=1, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda s: pkd_loss(s, teacher), student)

    @pytest.mark.parametrize("shape", [(0, 3, 4, 5), (1, 3, 1, 1), (1, 3, 0, 4)])
    def test_fewer_than_two_positions(self, shape):
        student = torch.ones(shape, requires_grad=True)
        loss = pkd_loss(student, torch.zeros(shape))
        loss.backward()
        assert loss.item() == 0 and torch.isfinite(student.grad).all()

    def test_constant_channels_have_finite_gradients(self):
        student = torch.zeros(1, 2, 3, 3, requires_grad=True)
        pkd_loss(student, _random(1, 2, 3, 3)).backward()
        assert torch.isfinite(student.grad).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_fp32(self, dtype):
        student, teacher = _random(1, 2, 8, 8).to(dtype), _random(1, 2, 8, 8, seed=1).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = pkd_loss(student, teacher)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, pkd_loss(student.float(), teacher.float()))

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\).*\(1, 4, 3, 3\)"):
            pkd_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3))


class TestStandardise:
    def test_statistics(self):
        out = standardise(5 + 3 * _random(2, 4, 3, 3))
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-6, rtol=0)
        torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=0)

    def test_single_position_is_zero(self):
        assert standardise(torch.full((1, 2, 1, 1), 3.0)).abs().sum() == 0


class TestAlignment:
    student = torch.tensor([0.0, 1, 2, 3]).reshape(1, 1, 2, 2)
    teacher = torch.tensor([0.0, 0, 4, 4]).reshape(1, 1, 2, 2)

    def test_worked_out(self):
        out = align_statistics(self.student, self.teacher).flatten()
        expected = torch.tensor([-0.683280, 1.105573, 2.894427, 4.683280])
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        "activation, expected",
        [
            (torch.relu, [0.190934, 0.190934, 2.603022, 5.015110]),
            (lambda x: x, [-1.786334, -0.143167, 3.143167, 4.786334]),
        ],
    )
    def test_tap_after_and_before_the_activation(self, activation, expected):
        student, teacher = _map([-2, -1, 1, 2]), _map([-2, 0, 4, 4])
        out = align_statistics(activation(student), activation(teacher)).flatten()
        torch.testing.assert_close(out, torch.tensor(expected), atol=1e-5, rtol=0)

    def test_invariant_to_scale_and_shift_of_the_student(self):
        student, teacher = _random(2, 3, 4, 4), 2 + _random(2, 3, 4, 4, seed=1)
        reference = align_statistics(student, teacher)
        torch.testing.assert_close(align_statistics(4 * student - 7, teacher), reference)
        std, mean = torch.std_mean(reference, (0, 2, 3))
        torch.testing.assert_close(mean, teacher.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(std, teacher.std((0, 2, 3)), atol=1e-5, rtol=1e-5)

    def test_equal_statistics_are_the_identity(self):
        student = _random(1, 2, 4, 4)
        torch.testing.assert_close(
            align_statistics(student, student.flip(3)), student, rtol=1e-4, atol=1e-5
        )

    def test_gradient_is_centred_and_orthogonal_to_the_feature(self):
        student = _random(2, 3, 4, 4).requires_grad_()
        teacher = _random(2, 3, 4, 4, seed=1).requires_grad_()
        (align_statistics(student, teacher) * _random(2, 3, 4, 4, seed=2)).sum().backward()
        assert teacher.grad is None
        centred = (student - student.mean((0, 2, 3), keepdim=True)).detach()
        zero = torch.zeros(3)
        torch.testing.assert_close(student.grad.sum((0, 2, 3)), zero, atol=1e-4, rtol=0)
        torch.testing.assert_close((student.grad * centred).sum((0, 2, 3)), zero, atol=1e-4, rtol=0)

    def test_dead_channel(self):
        student = torch.zeros(1, 1, 2, 2, requires_grad=True)
        out = align_statistics(student, self.teacher)
        torch.testing.assert_close(out, torch.full((1, 1, 2, 2), 2.0))
        out.backward(torch.tensor([0.0, 1, 2, 3]).reshape(1, 1, 2, 2))
        expected = 1e6 * math.sqrt(16 / 3) * torch.tensor([-1.5, -0.5, 0.5, 1.5])
        torch.testing.assert_close(student.grad.flatten(), expected, rtol=1e-5, atol=0)

    def test_dead_channel_before_a_relu_has_no_gradient(self):
        before = torch.full((1, 1, 2, 2), -1.0, requires_grad=True)
        align_statistics(torch.relu(before), self.teacher).backward(self.student)
        assert before.grad.abs().sum() == 0

    def test_one_position_is_left_alone(self):
        student = torch.tensor([3.0]).reshape(1, 1, 1, 1)
        assert align_statistics(student, torch.zeros(1, 1, 1, 1)) is student

    def test_gradcheck(self):
        student = _random(2, 2, 2, 2, dtype=torch.float64).requires_grad_()
        teacher = _random(2, 2, 2, 2, seed=1, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda s: align_statistics(s, teacher), student)

    def test_channels_must_agree(self):
        with pytest.raises(ValueError, match="equal channels"):
            align_statistics(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3))


class TestAgainstAutograd:
    """The written-out gradient is that of the formula."""

    @staticmethod
    def _formula(x, reference, eps=1e-6):
        std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
        result = (x - mean) / (std + eps)
        if reference is None:
            return result
        std, mean = torch.std_mean(reference, dim=(0, 2, 3), keepdim=True)
        return result * std + mean

    @pytest.mark.parametrize("aligned", [True, False])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_value_and_gradient(self, aligned, memory_format):
        student, teacher = 3 + 2 * _random(2, 4, 3, 5), _random(1, 4, 2, 3, seed=1) - 7
        student[:, 1] = 0.3  # a constant channel, whose mean is not a number of the type
        student = student.contiguous(memory_format=memory_format).requires_grad_()
        ours = align_statistics(student, teacher) if aligned else standardise(student)
        theirs = self._formula(student, teacher if aligned else None)
        torch.testing.assert_close(ours, theirs)
        constant = teacher[:, 1].mean() if aligned else torch.zeros((), dtype=ours.dtype)
        torch.testing.assert_close(ours[:, 1], constant.expand_as(ours[:, 1]))
        # the gradient comes in the other format
        weights = _random(2, 4, 3, 5, seed=2)
        if memory_format is torch.contiguous_format:
            weights = weights.contiguous(memory_format=torch.channels_last)
        gradients = [torch.autograd.grad((y * weights).sum(), student)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
        assert gradients[0].stride() == student.stride()

    def test_finite_differences(self):
        student = _random(2, 3, 2, 3).double().requires_grad_()
        assert torch.autograd.gradcheck(standardise, student)

    def test_a_second_derivative_is_an_error_not_a_wrong_number(self):
        student = _random(1, 2, 2, 2).requires_grad_()
        (gradient,) = torch.autograd.grad(
            standardise(student).square().sum(), student, create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
