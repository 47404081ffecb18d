"""Hard-negative mining against a loop and by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from kd_d2.losses.hard_negative import hard_negative_cross_entropy


def _naive(logits, labels, ratio):
    total, background = 0.0, logits.shape[2] - 1
    for image, image_labels in zip(logits, labels):
        losses = [
            (math.log(sum(math.exp(v) for v in row)) - row[label], label)
            for row, label in zip(image.tolist(), image_labels.tolist())
        ]
        positives = [loss for loss, label in losses if label != background]
        negatives = sorted((x for x, label in losses if label == background), reverse=True)
        total += sum(positives) + sum(negatives[: int(ratio * len(positives))])
    return total


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ratio", [3.0, 1.5, 0.0])
def test_equals_a_loop(seed, ratio):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 30, 5, generator=generator, dtype=torch.float64) * 3
    # images with few, with many (fewer negatives than wanted) and without positives
    labels = torch.full((3, 30), 4)
    labels[0, :4] = torch.tensor([0, 3, 1, 1])
    labels[1, 5:20] = torch.randint(0, 4, (15,), generator=generator)
    result = hard_negative_cross_entropy(logits, labels, ratio)
    assert result.item() == pytest.approx(_naive(logits, labels, ratio), rel=1e-9)


@pytest.mark.parametrize("num_positive", [1, 4])
def test_logits_of_zero(num_positive):
    labels = torch.full((1, 200), 80)
    labels[0, 10 : 10 + num_positive] = 7
    loss = hard_negative_cross_entropy(torch.zeros(1, 200, 81), labels)
    assert loss.item() / num_positive == pytest.approx(17.577797, abs=1e-5)


def test_gradient_reaches_positives_and_hardest_negatives_only():
    logits = torch.zeros(1, 6, 3, requires_grad=True)
    labels = torch.tensor([[2, 0, 2, 2, 2, 2]])
    with torch.no_grad():
        logits[0, :, 2] = torch.tensor([1.0, 0, -1, 5, -2, 0])  # of the negatives 4, 2, 5 lose most
    hard_negative_cross_entropy(logits, labels).backward()
    assert (logits.grad[0].abs().sum(dim=1) > 0).tolist() == [False, True, True, False, True, True]
    expected = logits.detach()[0].softmax(dim=1) - F.one_hot(labels[0], 3)
    torch.testing.assert_close(logits.grad[0, [1, 2, 4, 5]], expected[[1, 2, 4, 5]])


def test_no_positives_is_zero_with_a_graph():
    logits = torch.randn(2, 9, 4, requires_grad=True)
    loss = hard_negative_cross_entropy(logits, torch.full((2, 9), 3))
    assert loss.item() == 0
    loss.backward()
    assert logits.grad.abs().sum() == 0


def test_mining_is_per_image():
    """The second image's hard negatives do not take the places of the first one's."""
    logits = torch.zeros(2, 10, 2)
    logits[1, :, 0] = 9.0
    labels = torch.ones(2, 10, dtype=torch.long)
    labels[0, 0] = 0
    loss = hard_negative_cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(4 * math.log(2), rel=1e-6)


def test_half_precision_input_is_computed_in_fp32():
    labels = torch.tensor([[0, 1, 1, 1, 1]])
    logits = torch.randn(1, 5, 2).half() * 10
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = hard_negative_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_naive(logits.double(), labels, 3), rel=1e-5)
