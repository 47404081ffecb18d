"""Soft cross entropy, CAReg and its variants: the specification's values, and naive loops."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes

from kd_d2.losses.box import convert_deltas
from kd_d2.projects.gdetkd.prediction import (
    REG_MODES,
    Regression,
    SoftCrossEntropy,
)
from kd_d2.projects.gdetkd.records import RoIBatch

ONE = (10.0, 10.0, 5.0, 5.0)
TWO = (20.0, 20.0, 10.0, 10.0)


def rois(cls, box, labels=None, stage=0):
    K = cls.shape[1] - 1
    labels = (
        torch.zeros(len(cls), dtype=torch.int64) if labels is None else torch.tensor(labels).long()
    )
    return RoIBatch(
        boxes=[Boxes(torch.rand(len(cls), 4))],
        gt_classes=labels,
        gt_boxes=torch.rand(len(cls), 4),
        num_classes=K,
        embed=torch.zeros(len(cls), 1),
        cls=cls,
        box=box,
        stage=stage,
    )


def soft_cross_entropy(student, teacher):
    return SoftCrossEntropy()(rois(student, None), {"cls": teacher})


# --------------------------------------------------------------------------------------- cls
def test_entropy_and_no_gradient_where_both_agree():
    logits = torch.tensor([[2.0, 0.0, 1.0]]).requires_grad_()
    value = soft_cross_entropy(logits, torch.tensor([[2.0, 0.0, 1.0]]))
    value.backward()
    assert value.item() == pytest.approx(0.832396, abs=1e-6)
    torch.testing.assert_close(logits.grad, torch.zeros(1, 3), atol=1e-7, rtol=0)


def test_uniform_student():
    value = soft_cross_entropy(torch.zeros(4, 3), torch.tensor([[2.0, 0.0, 1.0]]).repeat(4, 1))
    assert value.item() == pytest.approx(math.log(3), abs=1e-6)


def test_mean_over_the_rows_and_only_the_student_learns():
    student = torch.randn(2, 4, requires_grad=True)
    teacher = torch.randn(2, 4, requires_grad=True)
    both = soft_cross_entropy(student, teacher)
    singles = [soft_cross_entropy(student[i : i + 1], teacher[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(both, sum(singles) / 2)
    both.backward()
    expected = (student.softmax(1) - teacher.softmax(1)) / 2
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def test_cls_without_rows_is_a_zero_with_graph():
    student = torch.zeros(0, 4, requires_grad=True)
    value = soft_cross_entropy(student, torch.zeros(0, 4))
    value.backward()
    assert value.item() == 0 and student.grad.shape == (0, 4)


def test_half_precision_is_computed_in_full():
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    low = SoftCrossEntropy()(
        rois(student.bfloat16(), None), {"cls": teacher.bfloat16(), "box": None}
    )
    assert low.dtype == torch.float32
    expected = soft_cross_entropy(student.bfloat16().float(), teacher.bfloat16().float())
    assert torch.equal(low, expected)


# ------------------------------------------------------------------------------------ deltas
def test_deltas_with_other_weights_describe_the_same_boxes():
    torch.manual_seed(0)
    source = torch.rand(6, 4) * 40
    source[:, 2:] += source[:, :2] + 5
    target = source + torch.rand(6, 4)
    ones = Box2BoxTransform(ONE).get_deltas(source, target)
    twos = Box2BoxTransform(TWO).get_deltas(source, target)
    assert torch.equal(convert_deltas(ones, ONE, TWO), 2 * ones)
    torch.testing.assert_close(convert_deltas(ones, ONE, TWO), twos)
    torch.testing.assert_close(convert_deltas(twos, TWO, ONE), ones)
    other = (1.0, 2.0, 3.0, 4.0)
    deltas = torch.ones(1, 4)
    expected = torch.tensor([[0.1, 0.2, 0.6, 0.8]])
    torch.testing.assert_close(convert_deltas(deltas, ONE, other), expected)


# --------------------------------------------------------------------------------------- reg
def logits_of(*scores):
    return torch.tensor(scores).log()


def regression(mode, difference, scores, labels=None, width=None, weights=(ONE, ONE), stage=0):
    """Loss of a student at 0 and a teacher at ``difference`` (R, K or 1, 4), and the gradient."""
    difference = torch.tensor(difference)
    R = len(difference)
    student = torch.zeros(R, (width or difference.shape[1]) * 4, requires_grad=True)
    batch = rois(torch.zeros(R, len(scores[0])), student, labels, stage)
    term = Regression(mode, [weights[0]] * (stage + 1), [weights[1]] * (stage + 1))
    value = term(batch, {"cls": logits_of(*scores), "box": difference.view(R, -1)})
    value.backward()
    return value.item(), student.grad.view(R, -1, 4)


SCORES = [[0.5, 0.3, 0.2]]


def test_caware_by_hand():
    value, gradient = regression("caware", [[[1.0, 0, 0, 0], [-1.0, 2, 0, 0]]], SCORES)
    assert value == pytest.approx(0.8, abs=1e-6)
    expected = torch.tensor([[[-0.5, -0.5, 0, 0], [-0.3, -0.3, 0, 0]]])
    torch.testing.assert_close(gradient, expected)


def test_caware_differences_cancel_across_classes():
    value, _ = regression("caware", [[[3.0, 0, 0, 0], [-5.0, 0, 0, 0]]], SCORES)
    assert value == pytest.approx(0, abs=1e-6)


def test_equal_differences_are_weighted_with_the_foreground():
    same = [[[0.4, -0.2, 0, 0.1]] * 2]
    assert regression("caware", same, SCORES)[0] == pytest.approx(0.56, abs=1e-6)
    assert regression("fg_weighted", [[same[0][0]]], SCORES)[0] == pytest.approx(0.56, abs=1e-6)


@pytest.mark.parametrize("mode", ["caware", "fg_weighted", "gt_class"])
def test_divided_by_all_sampled_rois(mode):
    """Also by those without foreground, like Detectron2's box loss."""
    width = 1 if mode == "fg_weighted" else 2
    difference = [[[1.0, 0, 0, 0]] * width, [[0.0] * 4] * width]
    value, _ = regression(mode, difference, SCORES * 2, labels=[1, 2])
    assert value == pytest.approx((1.0 if mode == "gt_class" else 0.8) / 2, abs=1e-6)


def test_gt_class_reads_the_labelled_class_of_positives_only():
    difference = [
        [[1.0, 0, 0, 0], [0, 2, 0, 0]],
        [[4.0, 0, 0, 0], [0, 8, 0, 0]],
        [[16.0, 0, 0, 0], [0, 32, 0, 0]],
    ]
    value, gradient = regression("gt_class", difference, SCORES * 3, labels=[1, 2, 0])
    assert value == pytest.approx((2 + 16) / 3)
    expected = torch.zeros(3, 2, 4)
    expected[0, 1, 1] = expected[2, 0, 0] = -1 / 3
    torch.testing.assert_close(gradient, expected)


def test_gt_class_of_an_agnostic_head():
    value, _ = regression("gt_class", [[[1.0, 0, 0, 0]], [[4.0, 0, 0, 0]]], SCORES * 2, [1, 2])
    assert value == pytest.approx(0.5)


def test_one_agnostic_head_stands_for_every_class():
    """Teacher (R, K, 4), student (R, 1, 4): eq. 3 with the student's box for every class."""
    difference = [[[1.0, 0, 0, 0], [-1.0, 2, 0, 0]]]
    value, gradient = regression("fg_weighted", difference, SCORES, width=1)
    assert value == pytest.approx(0.8, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[[-0.8, -0.8, 0, 0]]]))


def test_the_weights_of_the_stage_count():
    difference = [[[0.4, -0.2, 0, 0.1]]]
    value, _ = regression("fg_weighted", difference, SCORES, weights=(TWO, ONE), stage=2)
    assert value == pytest.approx(1.12, abs=1e-6)
    batch = rois(torch.zeros(1, 3), torch.zeros(1, 4), stage=1)
    term = Regression("fg_weighted", [ONE, TWO, ONE], [ONE, ONE, TWO])
    teacher = {"cls": logits_of(*SCORES), "box": torch.tensor(difference).view(1, 4)}
    assert term(batch, teacher).item() == pytest.approx(1.12, abs=1e-6)
    batch.stage = 2
    assert term(batch, teacher).item() == pytest.approx(0.28, abs=1e-6)


@pytest.mark.parametrize("mode", [name for name, _ in REG_MODES])
class TestEveryMode:
    def test_a_naive_loop(self, mode):
        torch.manual_seed(1)
        R, K = 7, 3
        student, teacher = torch.randn(R, K, 4), torch.randn(R, K, 4)
        logits, labels = torch.randn(R, K + 1), [0, 3, 2, 1, 3, 3, 2]
        batch = rois(torch.zeros(R, K + 1), student.view(R, -1), labels)
        term = Regression(mode, [TWO], [ONE])
        value = term(batch, {"cls": logits, "box": teacher.view(R, -1)})
        expected = 0.0
        for i in range(R):
            p = [math.exp(x) for x in logits[i].tolist()]
            p = [x / sum(p) for x in p]
            for j in range(4):
                if mode == "gt_class":
                    c = labels[i]
                    found = abs(2 * teacher[i, c, j] - student[i, c, j]) if c < K else 0
                else:
                    pulls = (p[c] * (2 * teacher[i, c, j] - student[i, c, j]) for c in range(K))
                    found = abs(sum(pulls))
                expected += float(found) / R
        assert value.item() == pytest.approx(expected, rel=1e-5)

    def test_equal_deltas_and_no_rows_give_zero(self, mode):
        for rows in (5, 0):
            deltas = torch.randn(rows, 12)
            student = deltas.clone().requires_grad_()
            batch = rois(torch.zeros(rows, 4), student, [1] * rows)
            value = Regression(mode, [ONE], [ONE])(
                batch, {"cls": torch.randn(rows, 4), "box": deltas}
            )
            value.backward()
            assert value.item() == 0 and student.grad is not None

    def test_the_teacher_gets_no_gradient(self, mode):
        teacher = {
            "cls": torch.randn(5, 4, requires_grad=True),
            "box": torch.randn(5, 12, requires_grad=True),
        }
        student = torch.randn(5, 12, requires_grad=True)
        batch = rois(torch.zeros(5, 4), student, [0, 1, 2, 3, 3])
        Regression(mode, [ONE], [ONE])(batch, teacher).backward()
        assert teacher["cls"].grad is None and teacher["box"].grad is None
        assert student.grad.abs().sum() > 0
