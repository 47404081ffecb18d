"""The cosine loss: values worked out by hand, gradients, and who receives them."""

import pytest
import torch
from torch.nn import functional as F

from kd_d2.config import get_cfg
from kd_d2.projects.mimicdet.mimic_loss import MimicLoss, cosine_distance, mimic_losses
from kd_d2.projects.mimicdet.outputs import HeadOutput
from tests.projects.mimicdet.head_cases import (
    S_STRIDES,
    T_STRIDES,
    proposals,
    pyramid,
    s_head,
    t_head,
)


def _output(logits, reg_feature, cls_feature=None, deltas=None):
    logits, reg_feature = torch.tensor(logits), torch.tensor(reg_feature)
    return HeadOutput(
        torch.zeros_like(reg_feature) if cls_feature is None else torch.tensor(cls_feature),
        reg_feature,
        logits,
        torch.zeros(len(logits), 4) if deltas is None else deltas,
    )


def _classes(num_boxes):
    """Any classes of so many boxes an image."""
    return [torch.zeros(count, dtype=torch.int64) for count in num_boxes]


# eq. 1 with two boxes: 1 - 24/25 and 1, 0.043817 and 0
TEACHER = _output([[2.0, 1, 0], [0, 0, 5]], [[3.0, 4], [1, 0]])
STUDENT = _output([[3.0, 2, 1], [0, 0, 1]], [[4.0, 3], [0, 1]])


@pytest.mark.parametrize(
    "student, teacher, value",
    [
        ([1, 2, 3], [2, 4, 6], 0),
        ([1, 0, 0], [0, 3, 0], 1),
        ([1, -2, 3], [-2, 4, -6], 2),
        ([1, 0], [1, 1], 0.292893),
        ([2, 1, 0], [3, 2, 1], 0.043817),
        ([3, 4], [4, 3], 0.04),
        ([0, 0], [1, 1], 1),
    ],
)
def test_distance_of_one_row(student, teacher, value):
    rows = torch.tensor([student], dtype=torch.float), torch.tensor([teacher], dtype=torch.float)
    assert cosine_distance(*rows).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("eps, gradient", [(1e-2, -50), (1e-8, -5e7)])
def test_gradient_at_zero(eps, gradient):
    student = torch.zeros(1, 4, requires_grad=True)
    cosine_distance(student, torch.ones(1, 4), eps).backward()
    torch.testing.assert_close(student.grad, torch.full((1, 4), float(gradient)))


def test_gradient_is_inverse_to_the_norm():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    (gradient,) = torch.autograd.grad(cosine_distance(student, teacher), student)
    scaled = (10 * student).detach().requires_grad_()
    (at_ten,) = torch.autograd.grad(cosine_distance(scaled, teacher), scaled)
    torch.testing.assert_close(at_ten, gradient / 10)
    double = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cosine_distance(x, teacher.double()), (double,))


def test_equation_1():
    losses = mimic_losses(STUDENT, TEACHER)
    assert set(losses) == {"loss_mimic_cls", "loss_mimic_reg"}
    assert losses["loss_mimic_reg"].item() == pytest.approx(0.52, abs=1e-6)
    assert losses["loss_mimic_cls"].item() == pytest.approx(0.021909, abs=1e-6)
    assert sum(losses.values()).item() == pytest.approx(0.541909, abs=1e-6)


def test_logits_are_compared_with_their_offset():
    shifted = TEACHER._replace(logits=TEACHER.logits[:1] + 1, reg_feature=TEACHER.reg_feature[:1])
    loss = mimic_losses(shifted, TEACHER.rows(torch.tensor([0])))["loss_mimic_cls"]
    assert loss.item() == pytest.approx(0.043817, abs=1e-6)


@pytest.mark.parametrize("point", ["post_relu", "pre_relu"])
@pytest.mark.parametrize("target", ["logits", "feature"])
@pytest.mark.parametrize("split", [True, False])
def test_what_is_compared(point, target, split):
    torch.manual_seed(0)
    outputs = [HeadOutput(*(torch.randn(4, d) for d in (6, 6, 5, 4))) for _ in range(2)]
    act = {"post_relu": F.relu, "pre_relu": lambda x: x}[point]
    losses = mimic_losses(*outputs, split=split, cls_target=target, feature_point=point)

    def mean(vectors):
        total = 0.0
        for s, t in zip(*(vectors(x) for x in outputs)):
            total += 1 - (s @ t / (s.norm() * t.norm())).item()
        return total / 4

    expected = {"loss_mimic_feature": mean(lambda x: act(x.reg_feature))}
    if split:
        cls = mean(lambda x: x.logits if target == "logits" else act(x.cls_feature))
        expected = {"loss_mimic_cls": cls, "loss_mimic_reg": expected["loss_mimic_feature"]}
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_no_boxes_give_a_connected_zero(detach):
    sides = [
        HeadOutput(*(torch.zeros(0, d, requires_grad=True) for d in (6, 6, 5, 4))) for _ in range(2)
    ]
    losses = MimicLoss(detach_teacher=detach)(*sides, _classes([0, 0]))
    assert all(x.item() == 0 for x in losses.values())
    sum(losses.values()).backward()
    assert sides[0].logits.grad is not None and sides[0].reg_feature.grad is not None
    assert (sides[1].logits.grad is not None) is not detach


def test_half_precision_under_autocast():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 40, requires_grad=True), torch.randn(5, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cosine_distance(student.half(), teacher.half())
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, cosine_distance(student, teacher), atol=1e-3, rtol=0)


def test_random_subset_is_taken_per_image_and_of_both_sides():
    torch.manual_seed(0)
    counts = [6, 0, 2, 5]
    # row i is e_i on both sides, so that a row that is paired with another one costs 1
    rows = torch.eye(13).requires_grad_()
    output = HeadOutput(rows, rows, rows, torch.zeros(13, 4))
    teacher = HeadOutput(*(x.detach() * 2 for x in output))
    losses = MimicLoss(num_samples=3)(output, teacher, _classes(counts))
    assert all(x.item() == pytest.approx(0, abs=1e-6) for x in losses.values())
    seen = set()
    for _ in range(40):
        other = teacher._replace(logits=torch.ones(13, 13))
        loss = MimicLoss(num_samples=3)(output, other, _classes(counts))["loss_mimic_cls"]
        (gradient,) = torch.autograd.grad(loss, rows)
        picked = gradient.abs().sum(1) > 0
        assert [int(x.sum()) for x in picked.split(counts)] == [3, 0, 2, 3]
        seen |= set(picked.nonzero().flatten().tolist())
    assert seen == set(range(13))


def test_weight_and_config():
    cfg = get_cfg()
    node = cfg.MODEL.MIMICDET
    node.MIMIC.WEIGHT, node.MIMIC.CLS_TARGET, node.MIMIC.EPS = 2.5, "logits", 5.0
    losses = MimicLoss(cfg)(STUDENT, TEACHER, _classes([1, 1]))
    # no norm but one reaches eps = 5: divided by 25 each
    assert losses["loss_mimic_reg"].item() == pytest.approx(2.5 * (1 - 24 / 25 + 1) / 2, abs=1e-6)
    assert losses["loss_mimic_cls"].item() == pytest.approx(
        2.5 * (1 - 8 / 25 + 1 - 5 / 25) / 2, abs=1e-6
    )
    node.T_HEAD.VARIANT = "light"
    assert set(MimicLoss(cfg)(STUDENT, TEACHER, _classes([1, 1]))) == {"loss_mimic_feature"}


def test_factors_of_the_terms_and_schedule():
    cfg = get_cfg()
    node = cfg.MODEL.MIMICDET.MIMIC
    node.WEIGHT, node.CLS_WEIGHT, node.REG_WEIGHT = 2.0, 5.0, 0.5
    node.SCHEDULE.START_ITER, node.SCHEDULE.WARMUP_ITERS = 10, 1
    loss = MimicLoss(cfg)
    values = MimicLoss()(STUDENT, TEACHER, _classes([1, 1]))
    # before the start, in the warm-up and behind it
    for iteration, factor in ((9, 0.0), (10, 0.5), (11, 1.0)):
        terms = loss(STUDENT, TEACHER, _classes([1, 1]), iteration)
        assert terms["loss_mimic_cls"] == pytest.approx(10 * factor * values["loss_mimic_cls"])
        assert terms["loss_mimic_reg"] == pytest.approx(factor * values["loss_mimic_reg"])


def test_boxes_that_are_objects():
    torch.manual_seed(0)
    # three classes; the second image has one object, the third none
    classes = [torch.tensor(x) for x in ([0, 3, 2, 1], [3, 0], [3, 3])]
    rows = torch.eye(8).requires_grad_()
    output, others = HeadOutput(rows, rows, rows, rows), torch.ones(8, 8)
    teacher = HeadOutput(others, others, others, others)
    for samples, expected in ((-1, [3, 1, 0]), (2, [2, 1, 0])):
        loss = MimicLoss(boxes="objects", num_samples=samples, num_classes=3)
        terms = loss(output, teacher, classes)
        # the mean over the boxes that are left
        assert terms["loss_mimic_reg"].item() == pytest.approx(1 - 8**-0.5, abs=1e-6)
        (gradient,) = torch.autograd.grad(terms["loss_mimic_cls"], rows)
        picked = (gradient.abs().sum(1) > 0).split([4, 2, 2])
        assert [int(x.sum()) for x in picked] == expected
        assert not any((x & (c == 3)).any() for x, c in zip(picked, classes))
    background = [torch.full_like(x, 3) for x in classes]
    nothing = MimicLoss(boxes="objects", num_classes=3)(output, teacher, background)
    assert all(x.item() == 0 and x.requires_grad for x in nothing.values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight": -1.0}, "MIMIC.WEIGHT .* -1.0"),
        ({"reg_weight": -2.0}, "MIMIC.REG_WEIGHT .* -2.0"),
        ({"boxes": "positives"}, "MIMIC.BOXES .*'all', 'objects'.*positives"),
        ({"num_samples": 0}, "MIMIC.NUM_SAMPLES .* 0"),
        ({"eps": 0.0}, "MIMIC.EPS .* 0.0"),
        ({"cls_target": "probs"}, "MIMIC.CLS_TARGET .*'feature', 'logits'.*probs"),
        ({"feature_point": "relu"}, "MIMIC.FEATURE_POINT .*'post_relu', 'pre_relu'.*relu"),
    ],
)
def test_bad_values_name_the_key(options, message):
    with pytest.raises(ValueError, match=message):
        MimicLoss(**options)


def test_heads_of_different_widths():
    cfg = get_cfg()
    cfg.MODEL.MIMICDET.S_HEAD.FEAT_DIM = 512
    with pytest.raises(ValueError, match="FEAT_DIM is 512 .*FC_DIM 1024"):
        MimicLoss(cfg)
    narrow = _output([[2.0, 1, 0], [0, 0, 5]], [[3.0], [1]])
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(2, 2\).*FEAT_DIM"):
        mimic_losses(narrow, TEACHER)


def _gradients_of_heads(detach_teacher=True, detach_deltas=True, variant="dual"):
    """Which of the parameters and inputs of both heads get a gradient of the mimic losses."""
    split = variant == "dual"
    teacher, student = t_head(variant), s_head(detach_deltas=detach_deltas, split=split)
    boxes = proposals([5, 4])
    fine, coarse = pyramid(T_STRIDES, requires_grad=True), pyramid(S_STRIDES, requires_grad=True)
    deltas = pyramid(S_STRIDES, channels=4, seed=1, requires_grad=True)
    output = student.predict(student(coarse, deltas), boxes)
    loss = MimicLoss(detach_teacher=detach_teacher, split=split)
    sum(loss(output, teacher.features(fine, boxes), _classes([5, 4])).values()).backward()

    def some(tensors):
        return any(x.grad is not None and x.grad.any() for x in tensors)

    return {
        "t_head": some(teacher.parameters()),
        "fine": some(fine),
        "deltas": some(deltas),
        "coarse": some(coarse),
        "projections": all(some([x.weight]) for x in student.projections),
        "micro": all(
            some(layer.parameters())
            for align in student.align.values()
            for layer in align.micro_network[::2]
        ),
        "cls_score": some(student.cls_score.parameters()),
        "bbox_pred": some(student.bbox_pred.parameters()),
    }


@pytest.mark.parametrize("variant", ["dual", "light"])
@pytest.mark.parametrize("detach_teacher", [True, False])
@pytest.mark.parametrize("detach_deltas", [True, False])
def test_who_receives_gradients(detach_teacher, detach_deltas, variant):
    assert _gradients_of_heads(detach_teacher, detach_deltas, variant) == {
        "t_head": not detach_teacher,
        "fine": not detach_teacher,
        "deltas": not detach_deltas,
        "coarse": True,
        "projections": True,
        "micro": True,
        "cls_score": variant == "dual",  # the classification target are the logits
        "bbox_pred": False,
    }


def test_distance_is_bounded_by_both_norms():
    # eps clamps each norm by itself: |s| = 0.005 counts as 0.01
    loss = cosine_distance(torch.tensor([[0.003, 0.004]]), torch.tensor([[3.0, 4.0]]), 0.01)
    assert loss.item() == pytest.approx(0.5, abs=1e-6)
