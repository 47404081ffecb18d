"""InfoNCE against the formula, in chunks, at the limits, in half precision."""

import math

import pytest
import torch

from kd_d2.projects.gdetkd.infonce import info_nce
from tests.projects.gdetkd.loss_cases import naive_info_nce, saved_bytes, unit


def case(queries=7, negatives=11, dim=5, seed=0):
    """Random vectors and a mask in which row 3 has no negative."""
    q, p, n = (unit(k, dim, seed=seed + i) for i, k in enumerate((queries, queries, negatives)))
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(queries, negatives, generator=generator) > 0.4
    allowed[3] = False
    return [x.requires_grad_() for x in (q, p, n)], allowed


@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 100])
def test_equals_the_formula_in_value_and_gradient(chunk):
    inputs, allowed = case()
    result = info_nce(*inputs, temperature=0.3, allowed=allowed, chunk=chunk)
    rows = naive_info_nce(*inputs, allowed, 0.3)
    torch.testing.assert_close(result.loss, rows.mean())
    expected = torch.autograd.grad(rows.mean(), inputs)
    torch.testing.assert_close(torch.autograd.grad(result.loss, inputs), expected)
    cosines = (inputs[0] * inputs[1]).sum(1)
    torch.testing.assert_close(result.positive_cosine, cosines.mean().detach())
    ahead = [
        all(not a or q @ n < c for a, n in zip(row, inputs[2]))
        for q, c, row in zip(inputs[0], cosines, allowed)
    ]
    assert result.accuracy.item() == pytest.approx(sum(ahead) / 7)
    assert 0 < sum(ahead) < 7 and result.correct.tolist() == ahead
    assert result.valid_negatives.item() == pytest.approx(allowed.sum().item() / 7)
    assert not result.positive_cosine.requires_grad and not result.valid_negatives.requires_grad


@pytest.mark.parametrize("chunk", [0, 2])
def test_columns_name_the_negatives_that_the_mask_speaks_of(chunk):
    inputs, allowed = case()
    columns = torch.tensor([9, 10, 0, 1])
    whole = torch.ones_like(allowed)
    whole[:, columns] = allowed[:, :4]
    small = info_nce(*inputs, temperature=0.3, allowed=allowed[:, :4], columns=columns, chunk=chunk)
    large = info_nce(*inputs, temperature=0.3, allowed=whole)
    torch.testing.assert_close(tuple(small), tuple(large))


def test_without_a_mask_all_are_negatives():
    inputs, allowed = case()
    free = info_nce(*inputs, temperature=0.3)
    torch.testing.assert_close(
        tuple(free), tuple(info_nce(*inputs, temperature=0.3, allowed=torch.ones_like(allowed)))
    )
    assert free.valid_negatives == 11


def test_gradients_by_finite_differences():
    inputs, allowed = case(4, 5, 3)
    assert torch.autograd.gradcheck(
        lambda *x: info_nce(*x, temperature=0.5, allowed=allowed, chunk=2).loss, inputs
    )


@pytest.mark.parametrize("num_negatives", [0, 6])
def test_no_negative_no_loss_no_gradient(num_negatives):
    inputs, _ = case(4, num_negatives)
    allowed = torch.zeros(4, num_negatives, dtype=torch.bool)
    result = info_nce(*inputs, temperature=0.07, allowed=allowed)
    result.loss.backward()
    assert result.loss.item() == 0 and result.valid_negatives == 0 and result.accuracy == 1
    for x in inputs:
        assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("num_negatives", [0, 6])
@pytest.mark.parametrize("chunk", [0, 2])
def test_no_query_is_a_zero_with_a_graph(num_negatives, chunk):
    q, p, n = torch.empty(0, 5), torch.empty(0, 5), torch.randn(num_negatives, 5)
    inputs = [x.requires_grad_() for x in (q, p, n)]
    result = info_nce(*inputs, temperature=0.07, chunk=chunk)
    assert [x.item() for x in result[:3]] == [0, 0, 0]
    result.loss.backward()
    assert torch.equal(n.grad, torch.zeros_like(n))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    inputs, allowed = case(8, 64, 16)
    half = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        result = info_nce(*half, temperature=0.01, allowed=allowed, chunk=3)
    full = info_nce(*[x.float() for x in half], temperature=0.01, allowed=allowed)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result.loss, full.loss)
    result.loss.backward()
    assert all(x.grad.isfinite().all() for x in half)


def test_sharp_temperature_does_not_overflow():
    """e^(1 / 0.005) is beyond fp32."""
    x = torch.eye(4).requires_grad_()
    result = info_nce(x, -x, x, temperature=0.005)
    assert result.loss.item() == pytest.approx(400, abs=1e-3)
    result.loss.backward()
    assert x.grad.isfinite().all()


def test_values_with_a_full_queue():
    """ln K + 1 / (2 d t^2) without the pair's own cosine; a perfect student is not at 0 either."""
    q, p, n = (unit(k, 128, seed=k, dtype=torch.float32) for k in (48, 49, 81920))
    unrelated = info_nce(q, p[:48], n, temperature=0.07, chunk=16)
    expected = math.log(81920) + 1 / (2 * 128 * 0.07**2)
    loss = unrelated.loss + unrelated.positive_cosine / 0.07
    assert loss.item() == pytest.approx(expected, abs=0.05)
    perfect = info_nce(q, q, n, temperature=0.07, chunk=16)
    assert perfect.loss.item() == pytest.approx(0.107, abs=0.003)
    assert perfect.accuracy == 1 and unrelated.accuracy == 0


def test_chunks_bound_what_autograd_keeps():
    q, p, n = (unit(k, 8, seed=k, dtype=torch.float32) for k in (256, 257, 4000))
    p = p[:256]
    q.requires_grad_(), n.requires_grad_()
    matrix = 256 * 4001 * 4
    whole = saved_bytes(lambda: info_nce(q, p, n, temperature=0.1).loss)
    assert matrix <= whole <= 1.2 * matrix
    # the arguments, and nothing per pair
    parts = saved_bytes(lambda: info_nce(q, p, n, temperature=0.1, chunk=32).loss)
    assert parts < 1.2 * sum(x.nbytes for x in (q, p, n)) < 0.05 * matrix
