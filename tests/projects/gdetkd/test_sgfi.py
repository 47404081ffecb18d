"""SGFI: the specification's numbers, gradients, limits, types, chunks."""

import copy
import math

import pytest
import torch
from torch import nn

from kd_d2.projects.gdetkd.sgfi import SGFI
from tests.projects.gdetkd.loss_cases import saved_bytes

LEVELS = [[2.0, 0.0], [1.0, 2.0], [0.0, 1.0]]


def plain(levels, teacher, tau):
    """f_adapt is the identity, the key is the feature itself, one channel of 1 x 2."""
    sgfi = SGFI(
        student_channels=1, teacher_channels=1, num_levels=len(levels), key_dim=2, tau_init=tau
    )
    sgfi.adapt, sgfi.embed = nn.Identity(), nn.Flatten()
    return sgfi(
        torch.tensor(levels).reshape(1, -1, 1, 1, 2), torch.tensor(teacher).reshape(1, 1, 1, 2)
    )


@pytest.mark.parametrize(
    "tau, alpha, loss",
    [
        (1.0, [0.045279, 0.909443, 0.045279], 0.00922563),
        (0.5, [0.002467, 0.995067, 0.002467], 2.738e-5),
        (0.1, [0.0, 1.0, 0.0], 0.0),
    ],
)
def test_the_example(tau, alpha, loss):
    output = plain(LEVELS, [1.0, 2.0], tau)
    assert output.alpha[0].tolist() == pytest.approx(alpha, abs=1e-6)
    assert output.loss.item() == pytest.approx(loss, abs=1e-8)
    assert output.tau.item() == pytest.approx(tau)


def test_products_are_not_normalised():
    """A level of larger norm wins over the one that equals the teacher's."""
    output = plain([[3.0, 3.0], *LEVELS[1:]], [1.0, 2.0], 0.01)
    assert output.alpha[0].tolist() == pytest.approx([1, 0, 0])
    assert output.loss.item() == pytest.approx(2.5)


def test_uniform_without_a_key():
    output = plain([[2.0, 0.0], [1.0, 2.0], [0.0, 1.0]], [0.0, 0.0], 0.1)
    assert output.alpha[0].tolist() == pytest.approx([1 / 3] * 3)


def test_the_loss_is_a_mean_over_rois_and_elements():
    torch.manual_seed(0)
    sgfi = SGFI(student_channels=3, teacher_channels=4, num_levels=3, key_dim=5)
    student, teacher = torch.randn(6, 3, 3, 7, 7), torch.randn(6, 4, 7, 7)
    output = sgfi(student, teacher)
    losses = []
    for s, t, alpha in zip(student, teacher, output.alpha):
        adapted = sgfi.adapt(s)
        logits = [sgfi.embed(a[None])[0] @ sgfi.embed(t[None])[0] / math.sqrt(5) for a in adapted]
        torch.testing.assert_close(alpha, torch.stack(logits).softmax(0))
        merged = sum(w * a for w, a in zip(alpha, adapted))
        losses.append(((merged - t) ** 2).mean())
    torch.testing.assert_close(output.loss, sum(losses) / 6)
    torch.testing.assert_close(output.alpha.sum(dim=1), torch.ones(6), atol=1e-6, rtol=0)
    assert output.alpha.std() > 1e-3


# -------------------------------------------------------------------------------- the networks
def test_numbers_of_parameters():
    sgfi = SGFI(student_channels=256, teacher_channels=256, num_levels=5)
    assert sum(p.numel() for p in sgfi.adapt.parameters()) == 590080
    assert sum(p.numel() for p in sgfi.embed.parameters()) == 442624
    assert sum(p.numel() for p in sgfi.parameters()) == 590080 + 442624 + 1


@pytest.mark.parametrize("size, sizes", [(7, [3, 1]), (14, [6, 2])])
def test_sizes_inside_the_embedding(size, sizes):
    sgfi = SGFI(student_channels=2, teacher_channels=3, num_levels=2, key_dim=4)
    found = []
    for layer in sgfi.embed:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda module, args, output: found.append(output.shape[2:]))
    key = sgfi.embed(torch.randn(5, 3, size, size))
    assert [list(x) for x in found] == [[n, n] for n in sizes] and key.shape == (5, 4)
    assert (key >= 0).all()


def test_one_level_has_nothing_to_weigh():
    sgfi = SGFI(student_channels=2, teacher_channels=3, num_levels=1)
    assert {name for name, _ in sgfi.named_parameters()} == {"adapt.weight", "adapt.bias"}
    student, teacher = torch.randn(4, 1, 2, 6, 6), torch.randn(4, 3, 6, 6)
    output = sgfi(student, teacher)
    torch.testing.assert_close(output.loss, (sgfi.adapt(student[:, 0]) - teacher).square().mean())
    assert torch.equal(output.alpha, torch.ones(4, 1))


def test_weights_start_nearly_uniform():
    torch.manual_seed(0)
    sgfi = SGFI(student_channels=256, teacher_channels=256, num_levels=5)
    with torch.no_grad():
        output = sgfi(torch.randn(4, 5, 256, 7, 7), torch.randn(4, 256, 7, 7))
    assert output.tau.item() == pytest.approx(math.sqrt(128))
    assert 0.18 < output.alpha.min() and output.alpha.max() < 0.22


@pytest.mark.parametrize("log_tau, tau", [(-10.0, 0.01), (10.0, 100.0), (math.log(3), 3.0)])
def test_temperature_is_clamped(log_tau, tau):
    sgfi = SGFI(student_channels=2, teacher_channels=2, num_levels=2, key_dim=4)
    with torch.no_grad():
        sgfi.log_tau.fill_(log_tau)
    output = sgfi(torch.randn(1, 2, 2, 7, 7), torch.randn(1, 2, 7, 7))
    assert output.tau.item() == pytest.approx(tau)


# ----------------------------------------------------------------------------------- gradients
def test_gradients_reach_everything_but_the_teacher():
    torch.manual_seed(0)
    sgfi = SGFI(student_channels=2, teacher_channels=3, num_levels=3, key_dim=4)
    student = torch.randn(4, 3, 2, 7, 7, requires_grad=True)
    teacher = torch.randn(4, 3, 7, 7, requires_grad=True)
    output = sgfi(student, teacher)
    output.loss.backward()
    assert teacher.grad is None and all(level.any() for level in student.grad.unbind(1))
    assert all(p.grad.any() for p in sgfi.parameters())
    assert not output.alpha.requires_grad and not output.tau.requires_grad


def test_both_keys_train_the_embedding():
    """Finite differences in all parameters of the embedding and of the temperature."""
    torch.manual_seed(0)
    sgfi = SGFI(student_channels=1, teacher_channels=1, num_levels=2, key_dim=2).double()
    student = torch.randn(2, 2, 1, 7, 7, dtype=torch.float64)
    teacher = torch.randn(2, 1, 7, 7, dtype=torch.float64)
    sgfi(student, teacher).loss.backward()
    for parameter in sgfi.parameters():
        values, gradient = parameter.detach().reshape(-1), parameter.grad.reshape(-1)
        for i in range(0, len(values), 3):
            ends = []
            for step in (1e-6, -2e-6):
                values[i] += step
                ends.append(sgfi(student, teacher).loss.item())
            values[i] += 1e-6
            assert gradient[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)


# --------------------------------------------------------------------------- types, empty, errors
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    torch.manual_seed(0)
    sgfi = SGFI(student_channels=4, teacher_channels=4, num_levels=3, key_dim=4)
    student = (20 * torch.randn(5, 3, 4, 7, 7)).to(dtype).requires_grad_()
    teacher = (20 * torch.randn(5, 4, 7, 7)).to(dtype)
    exact = sgfi(student.detach().float(), teacher.float())
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = sgfi(student, teacher)
        assert output.loss.dtype == output.alpha.dtype == torch.float32
        torch.testing.assert_close(output.loss, exact.loss, rtol=0.05 if enabled else 1e-6, atol=0)
        output.loss.backward()
    assert student.grad.isfinite().all() and student.grad.any()


@pytest.mark.parametrize("num_levels", [1, 3])
@pytest.mark.parametrize("chunk", [0, 2])
def test_no_roi_is_a_zero_with_a_graph(num_levels, chunk):
    sgfi = SGFI(student_channels=2, teacher_channels=3, num_levels=num_levels, chunk=chunk)
    student = torch.randn(0, num_levels, 2, 7, 7, requires_grad=True)
    output = sgfi(student, torch.randn(0, 3, 7, 7))
    assert output.loss.item() == 0 and output.alpha.shape == (0, num_levels)
    output.loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in sgfi.parameters())


def test_errors():
    for key, arguments in {
        "KEY_DIM": {"key_dim": 0},
        "TAU_INIT": {"tau_init": 200.0},
        "CHUNK": {"chunk": -1},
    }.items():
        with pytest.raises(ValueError, match=rf"KD\.GDETKD\.SGFI\.{key} "):
            SGFI(student_channels=2, teacher_channels=2, num_levels=2, **arguments)
    sgfi = SGFI(student_channels=2, teacher_channels=2, num_levels=2)
    with pytest.raises(ValueError, match=r"\(4, 3, 2, 7, 7\) and \(4, 2, 7, 7\)"):
        sgfi(torch.randn(4, 3, 2, 7, 7), torch.randn(4, 2, 7, 7))


# ------------------------------------------------------------------------------------- chunks
@pytest.mark.parametrize("chunk", [1, 2, 5, 9])
@pytest.mark.parametrize("num_levels", [1, 3])
def test_chunks_change_nothing_but_memory(chunk, num_levels):
    torch.manual_seed(0)
    whole = SGFI(student_channels=2, teacher_channels=3, num_levels=num_levels, key_dim=4).double()
    parts = copy.deepcopy(whole)
    parts._chunk = chunk
    student = torch.randn(5, num_levels, 2, 7, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    outputs, gradients = [], []
    for sgfi in (whole, parts):
        outputs.append(sgfi(student, teacher))
        inputs = [student, *sgfi.parameters()]
        gradients.append(torch.autograd.grad(outputs[-1].loss, inputs))
    torch.testing.assert_close(*map(tuple, outputs))
    torch.testing.assert_close(*gradients)


def test_chunks_bound_what_autograd_keeps():
    whole = SGFI(student_channels=16, teacher_channels=16, num_levels=5)
    parts = SGFI(student_channels=16, teacher_channels=16, num_levels=5, chunk=4)
    student = torch.randn(64, 5, 16, 7, 7, requires_grad=True)
    teacher = torch.randn(64, 16, 7, 7)
    given = student.nbytes + teacher.nbytes
    weights = sum(p.nbytes for p in whole.parameters())
    kept = [saved_bytes(lambda: sgfi(student, teacher).loss) for sgfi in (whole, parts)]
    # the adapted features are as large as the given ones
    assert kept[0] > 1.8 * given
    assert kept[1] < 1.05 * given + weights
