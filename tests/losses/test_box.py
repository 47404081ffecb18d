import math

import pytest
import torch

from kd_d2.losses.box import (
    class_aware_localisation,
    convert_deltas,
    giou_loss,
    iou_log_loss,
    labelled_class_localisation,
)

_CASES = [
    # pred, target, 1 - GIoU, -ln IoU
    ([0, 0, 2, 2], [1, 1, 3, 3], 1.079365, 1.945910),
    ([0, 0, 1, 1], [2, 0, 3, 1], 1.333333, 13.815511),
    ([0, 0, 4, 2], [0, 0, 4, 4], 0.5, 0.693147),
    ([3, 5, 40, 90], [3, 5, 40, 90], 0.0, 0.0),
    # decoded dx = 0.5 of a 4 x 4 anchor, and a side shortened by a third of its FCOS distance
    ([2, 0, 6, 4], [0, 0, 4, 4], 2 / 3, math.log(3)),
    ([0, 2, 6, 6], [2, 2, 6, 6], 1 / 3, math.log(1.5)),
]


def _boxes(*rows):
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("pred, target, giou, log", _CASES)
def test_worked_out(pred, target, giou, log):
    pred, target = _boxes(pred), _boxes(target)
    assert giou_loss(pred, target).tolist() == pytest.approx([giou], abs=1e-5)
    assert iou_log_loss(pred, target).tolist() == pytest.approx([log], abs=1e-5)


def test_all_pairs_at_once_and_no_reduction():
    pred, target = _boxes(*(c[0] for c in _CASES)), _boxes(*(c[1] for c in _CASES))
    assert giou_loss(pred, target).tolist() == pytest.approx([c[2] for c in _CASES], abs=1e-5)
    # Both losses are symmetric, and do not change with position or scale.
    torch.testing.assert_close(giou_loss(target, pred), giou_loss(pred, target))
    torch.testing.assert_close(giou_loss(pred * 8 + 64, target * 8 + 64), giou_loss(pred, target))


@pytest.mark.parametrize("loss", [giou_loss, iou_log_loss])
@pytest.mark.parametrize(
    "pred, target",
    [
        ([1, 1, 1, 1], [1, 1, 1, 1]),
        ([1, 1, 1, 1], [0, 0, 4, 4]),
        ([5, 5, 2, 2], [0, 0, 4, 4]),
        ([5, 0, 2, 4], [3, 3, 3, 3]),
    ],
)
def test_degenerate_boxes_are_finite(loss, pred, target):
    pred = _boxes(pred).requires_grad_()
    value = loss(pred, _boxes(target))
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(pred.grad).all()
    assert value.item() >= (1 if loss is giou_loss else 13)


@pytest.mark.parametrize("loss", [giou_loss, iou_log_loss])
class TestBoth:
    def test_empty(self, loss):
        pred = torch.zeros(0, 4, requires_grad=True)
        out = loss(pred, torch.zeros(0, 4))
        assert out.shape == (0,)
        out.sum().backward()

    def test_gradient_reaches_the_prediction_only(self, loss):
        pred = _boxes([0, 0, 2, 2]).requires_grad_()
        target = _boxes([1, 1, 3, 3]).requires_grad_()
        loss(pred, target).sum().backward()
        assert pred.grad.abs().sum() > 0 and target.grad is None

    def test_gradcheck(self, loss):
        pred = torch.tensor([[0.3, 0.1, 5.2, 4.4], [1, 2, 9, 7.5]], dtype=torch.float64)
        target = torch.tensor([[1.0, 1.1, 6.0, 3.0], [0, 3, 8, 9]], dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda p: loss(p, target), pred.requires_grad_())

    def test_half_precision_is_computed_in_fp32(self, loss):
        # In fp16 the area of this box would overflow.
        boxes = _boxes([0, 0, 800, 600]).half()
        out = loss(boxes, boxes)
        assert out.dtype == torch.float32 and out.item() == 0

    def test_shapes_are_checked(self, loss):
        with pytest.raises(ValueError, match=r"\(2, 4\) and \(3, 4\)"):
            loss(torch.zeros(2, 4), torch.zeros(3, 4))


# ------------------------------------------------------------------- class-aware localisation
_WEIGHTS = torch.tensor([[0.5, 0.3]])


def _class_aware(*difference, student_classes=2):
    student = torch.zeros(1, student_classes, 4, requires_grad=True)
    return class_aware_localisation(student, torch.tensor([difference]), _WEIGHTS), student


@pytest.mark.parametrize(
    "difference, expected",
    [
        # the absolute value is outside the sum over the classes; inside it would be 1.4
        (([1.0, 0, 0, 0], [-1.0, 2, 0, 0]), 0.8),
        (([3.0, 0, 0, 0], [-5.0, 0, 0, 0]), 0.0),
        (([0.4, -0.2, 0, 0.1], [0.4, -0.2, 0, 0.1]), 0.56),
        (([0.4, -0.2, 0, 0.1],), 0.56),
    ],
)
def test_class_aware_localisation_by_hand(difference, expected):
    value, _ = _class_aware(*difference)
    assert value.tolist() == pytest.approx([expected], abs=1e-6)


def test_class_aware_gradient():
    value, student = _class_aware([1.0, 0, 0, 0], [-1.0, 2, 0, 0])
    value.sum().backward()
    expected = torch.tensor([[[-0.5, -0.5, 0, 0], [-0.3, -0.3, 0, 0]]])
    torch.testing.assert_close(student.grad, expected)


def test_class_aware_targets_are_constants_unless_wanted():
    student = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    class_aware_localisation(student, teacher, weights).sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None and weights.grad is None
    assert torch.autograd.gradcheck(
        lambda *x: class_aware_localisation(*x, detach_targets=False), (student, teacher, weights)
    )


def test_class_aware_without_rows_and_in_half_precision():
    student = torch.zeros(0, 3, 4, requires_grad=True)
    value = class_aware_localisation(student, torch.zeros(0, 1, 4), torch.zeros(0, 3))
    value.sum().backward()
    assert value.shape == (0,) and student.grad is not None
    rows = [torch.rand(4, 3, 4).bfloat16(), torch.rand(4, 3, 4).bfloat16()]
    weights = torch.rand(4, 3).bfloat16()
    low = class_aware_localisation(*rows, weights)
    expected = class_aware_localisation(*(x.float() for x in rows), weights.float())
    assert low.dtype == torch.float32 and torch.equal(low, expected)


@pytest.mark.parametrize(
    "student, teacher, weights",
    [
        ((5, 12), (5, 3, 4), (5, 3)),
        ((5, 3, 4), (4, 3, 4), (5, 3)),
        ((5, 3, 4), (5, 2, 4), (5, 3)),
        ((5, 3, 5), (5, 3, 4), (5, 3)),
        ((5, 3, 4), (5, 3, 4), (5, 4)),
        ((5, 3, 4), (5, 3, 4), (5,)),
    ],
)
def test_class_aware_shapes(student, teacher, weights):
    with pytest.raises(ValueError, match=r"\(R, K, 4\) or \(R, 1, 4\) and weights of shape"):
        class_aware_localisation(*(torch.zeros(x) for x in (student, teacher, weights)))


@pytest.mark.parametrize("width", [1, 2])
def test_labelled_class_localisation_reads_one_class(width):
    student = torch.zeros(2, width, 4, requires_grad=True)
    teacher = torch.tensor([[[1.0, 0, 0, -2], [0, 4, 0, 0]], [[8.0, 0, 0, 0], [0, 0, 0.5, 0]]])
    teacher = teacher[:, :width].clone().requires_grad_()
    value = labelled_class_localisation(student, teacher, torch.tensor([0, width - 1]))
    assert value.tolist() == ([3.0, 0.5] if width == 2 else [3.0, 8.0])
    value.sum().backward()
    assert teacher.grad is None
    expected = torch.zeros(2, width, 4)
    expected[0, 0, 0], expected[0, 0, 3] = -1, 1
    expected[(1, 1, 2) if width == 2 else (1, 0, 0)] = -1
    torch.testing.assert_close(student.grad, expected)
    none = labelled_class_localisation(student[:0], teacher[:0], torch.zeros(0).long())
    assert none.shape == (0,)


def test_convert_deltas_by_hand():
    ones = torch.ones(2, 3, 4).half()
    value = convert_deltas(ones, (10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.tensor([0.1, 0.2, 0.6, 0.8]).expand(2, 3, 4))
