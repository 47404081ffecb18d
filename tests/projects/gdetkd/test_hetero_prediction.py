"""Predictions of a two-stage teacher for the boxes of a RetinaNet (Appendix D)."""

import math

import pytest
import torch
from detectron2.structures import Boxes

from kd_d2.distillation import build_tap
from kd_d2.projects.gdetkd.hetero_prediction import (
    BestClassBox,
    DenseClassification,
    binary_cross_entropy,
    dense_terms,
    max_normalised,
)
from kd_d2.projects.gdetkd.records import RoIBatch
from tests.fixtures import tiny_cfg, tiny_model

ONES = (1.0, 1.0, 1.0, 1.0)
ROI_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def softmax_logits(*foreground):
    """Logits whose softmax has these foreground probabilities, background last."""
    return torch.tensor([*foreground, 1 - sum(foreground)]).log()[None]


# ------------------------------------------------------------------------------ classification
@pytest.mark.parametrize(
    "logits, expected",
    # specification, item 8
    [((2, -1, 0.5), 0.6), ((-3, -1, -2), 2.3), ((5, 5, 5), 0.0), ((0, 0, 0), 0.0)],
)
def test_oracles_of_max_norm(logits, expected):
    targets = rows((0.6, 0.1, 0.2))
    found = max_normalised(rows(logits), targets)
    torch.testing.assert_close(found, rows(expected), atol=1e-12, rtol=0)
    # the paper's formula, with a background logit of 0
    softmax = torch.cat([rows(logits), rows((0.0,))], dim=1).softmax(dim=1)
    scores = softmax[:, :3] / softmax.amax(dim=1)
    torch.testing.assert_close(found, -(targets * scores.log()).sum(dim=1))


def test_converted_scores_of_the_oracle():
    logits = rows((2, -1, 0.5))
    for c, expected in enumerate((1.0, 0.0498, 0.2231)):
        one = torch.zeros(1, 3, dtype=torch.float64)
        one[0, c] = 1.0
        assert math.exp(-max_normalised(logits, one).item()) == pytest.approx(expected, abs=5e-5)


def test_max_norm_is_stable_where_the_softmax_overflows():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = max_normalised(logits, torch.tensor([[0.5, 0.5]])).sum()
    assert loss.item() == 200.0
    loss.backward()
    assert torch.equal(logits.grad, torch.tensor([[0.5, -0.5]]))


def test_gradient_of_max_norm():
    """Logits that are not the highest are pushed up by P_t, the highest, if positive, down."""
    logits = rows((2, -1, 0.5)).requires_grad_()
    max_normalised(logits, rows((0.6, 0.1, 0.2))).sum().backward()
    torch.testing.assert_close(logits.grad, rows((0.3, -0.1, -0.2)))


def test_bce_by_hand():
    def term(z, p):
        s = 1 / (1 + math.exp(-z))
        return -(p * math.log(s) + (1 - p) * math.log(1 - s))

    expected = term(2, 0.6) + term(-1, 0.1) + term(0.5, 0.2)
    found = binary_cross_entropy(rows((2, -1, 0.5)), rows((0.6, 0.1, 0.2)))
    assert found.item() == pytest.approx(expected)


def batch(logits, boxes=((0, 0, 10, 10),), classes=(0,), anchors=None, deltas=None):
    """Boxes of one image, whose logits and deltas are leaves."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return RoIBatch(
        boxes=[Boxes(boxes)],
        gt_classes=torch.tensor(classes, dtype=torch.int64),
        gt_boxes=torch.zeros_like(boxes),
        num_classes=logits.shape[1],
        embed=torch.zeros(len(boxes), 2),
        cls=logits.requires_grad_(),
        box=(torch.zeros_like(boxes) if deltas is None else deltas).requires_grad_(),
        anchors=boxes if anchors is None else torch.tensor(anchors, dtype=torch.float32),
    )


def test_classification_reads_the_teachers_softmax_and_averages_over_all_boxes():
    rois = batch(
        torch.tensor([[2.0, -1.0, 0.5], [-3.0, -1.0, -2.0]]),
        boxes=((0, 0, 1, 1), (0, 0, 2, 2)),
        classes=(1, 3),
    )
    logits = softmax_logits(0.6, 0.1, 0.2).repeat(2, 1) + 7
    logits.requires_grad_()
    loss = DenseClassification("max_norm")(rois, {"cls": logits})
    assert loss.item() == pytest.approx((0.6 + 2.3) / 2, abs=1e-5)
    loss.backward()
    assert logits.grad is None and rois.cls.grad is not None


@pytest.mark.parametrize("mode", ["max_norm", "bce"])
def test_classification_without_a_box_is_zero_and_connected(mode):
    rois = batch(torch.zeros(0, 3), boxes=(), classes=())
    loss = DenseClassification(mode)(rois, {"cls": torch.zeros(0, 4)})
    assert loss.item() == 0
    loss.backward()
    assert rois.cls.grad is not None


def test_half_precision_is_lifted():
    rois = batch(torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float16))
    term = DenseClassification("bce")
    loss = term(rois, {"cls": softmax_logits(0.6, 0.1, 0.2).half()})
    assert loss.dtype == torch.float32


# ---------------------------------------------------------------------------------- regression
def encode(anchor, box, weights=ONES):
    """R-CNN's deltas, by hand."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = (
        ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0) for x0, y0, x1, y1 in (anchor, box)
    )
    deltas = ((bx - ax) / aw, (by - ay) / ah, math.log(bw / aw), math.log(bh / ah))
    return [w * d for w, d in zip(weights, deltas)]


def regression_case(**changes):
    """One foreground and one background box; the teacher believes in class 1 of 2."""
    student = (0.0, 0.0, 20.0, 10.0)
    wanted = (2.0, 1.0, 22.0, 13.0)
    other = (50.0, 50.0, 60.0, 60.0)
    anchor = (4.0, 4.0, 16.0, 20.0)
    values = {
        "logits": torch.zeros(2, 2),
        "boxes": (student, (0, 0, 5, 5)),
        "classes": (0, 2),
        "anchors": (anchor, (0, 0, 8, 8)),
        "deltas": torch.tensor([[0.1, -0.2, 0.3, 0.4], [9.0, 9.0, 9.0, 9.0]]),
        **changes,
    }
    rois = batch(**values)
    boxes = [*encode(student, other, ROI_WEIGHTS), *encode(student, wanted, ROI_WEIGHTS)]
    teacher = {
        # background is the highest of all, class 1 the highest foreground class
        "cls": torch.tensor([[0.0, 1.0, 5.0], [0.0, 1.0, 5.0]]),
        "box": torch.tensor([boxes, [0.0] * 8]),
    }
    target = encode(anchor, wanted)
    return rois, teacher, target


def test_regression_compares_with_the_box_of_the_best_foreground_class():
    rois, teacher, target = regression_case()
    loss = BestClassBox(ONES, ROI_WEIGHTS)(rois, teacher)
    expected = sum(abs(t - d) for t, d in zip(target, (0.1, -0.2, 0.3, 0.4)))
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    signs = [-math.copysign(1, t - d) for t, d in zip(target, (0.1, -0.2, 0.3, 0.4))]
    assert rois.box.grad[0].tolist() == signs and not rois.box.grad[1].any()


def test_regression_speaks_the_students_weights():
    rois, teacher, target = regression_case(
        deltas=torch.tensor([[0.0] * 4, [0.0] * 4]),
    )
    loss = BestClassBox((2.0, 2.0, 3.0, 3.0), ROI_WEIGHTS)(rois, teacher)
    expected = sum(w * abs(t) for w, t in zip((2, 2, 3, 3), target))
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_regression_of_a_class_agnostic_teacher():
    rois, teacher, target = regression_case(deltas=torch.tensor([[0.0] * 4, [0.0] * 4]))
    teacher["box"] = teacher["box"][:, 4:]
    loss = BestClassBox(ONES, ROI_WEIGHTS)(rois, teacher)
    assert loss.item() == pytest.approx(sum(map(abs, target)), rel=1e-4)


def test_regression_divides_by_the_foreground_boxes():
    rois, teacher, target = regression_case(classes=(0, 1))
    found = BestClassBox(ONES, ROI_WEIGHTS)(rois, teacher).item()
    first = sum(abs(t - d) for t, d in zip(target, (0.1, -0.2, 0.3, 0.4)))
    second = sum(abs(t - 9) for t in encode((0, 0, 8, 8), (0, 0, 5, 5)))
    assert found == pytest.approx((first + second) / 2, rel=1e-4)


@pytest.mark.parametrize("classes", [(2, 2), (0, 2)])
def test_regression_without_foreground_or_with_an_empty_box_is_zero_and_connected(classes):
    rois, teacher, _ = regression_case(classes=classes)
    # exp(-200) is no width
    teacher["box"][:, 6] = -1000.0
    loss = BestClassBox(ONES, ROI_WEIGHTS)(rois, teacher)
    assert loss.item() == 0
    loss.backward()
    assert rois.box.grad is not None and not rois.box.grad.any()


def test_regression_without_any_box():
    rois = batch(torch.zeros(0, 2), boxes=(), classes=())
    teacher = {"cls": torch.zeros(0, 3), "box": torch.zeros(0, 8)}
    loss = BestClassBox(ONES, ROI_WEIGHTS)(rois, teacher)
    assert loss.item() == 0
    loss.backward()


# ------------------------------------------------------------------------------------- configs
def terms(name="RetinaNet", teacher="GeneralizedRCNN", stage=0, student=None, **values):
    cfg = tiny_cfg(name, **{f"KD.GDETKD.{k.replace('__', '.')}": v for k, v in values.items()})
    student = student or tiny_model(name)
    teacher = tiny_model(teacher) if isinstance(teacher, str) else teacher
    keys = [build_tap(model).keys(model) for model in (student, teacher)]
    return dense_terms(cfg, *keys, (stage,))


def test_off_by_default():
    assert terms() == {} == terms("FCOS")


def test_weights():
    assert {n: w for n, (_, w) in terms(HETERO_PRED__CLS="bce").items()} == {"cls": 1.0}
    both = terms(
        HETERO_PRED__CLS="max_norm", HETERO_PRED__REG="l1", CLS__WEIGHT=0.5, REG__WEIGHT=2.0
    )
    assert {n: w for n, (_, w) in both.items()} == {"cls": 0.5, "reg": 2.0}
    assert terms(HETERO_PRED__CLS="max_norm", CLS__WEIGHT=0.0) == {}


def test_codecs_of_both_networks_are_read():
    student = {"MODEL.RETINANET.BBOX_REG_WEIGHTS": (2.0, 2.0, 3.0, 3.0)}
    term, _ = terms(
        teacher="Cascade",
        stage=1,
        student=tiny_model("RetinaNet", **student),
        HETERO_PRED__REG="l1",
    )["reg"]
    assert term._student.weights == (2.0, 2.0, 3.0, 3.0)
    assert term._teacher.weights == (20.0, 20.0, 10.0, 10.0)


@pytest.mark.parametrize("name", ["FCOS", "GFL", "ATSS"])
@pytest.mark.parametrize("values", [{"HETERO_PRED__CLS": "bce"}, {"HETERO_PRED__REG": "l1"}])
def test_other_dense_students_are_not_supported(name, values):
    with pytest.raises(ValueError, match="supported for RetinaNet only"):
        terms(name, **values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"CLS__WEIGHT": 1.0}, "CLS.WEIGHT is 1.0, but a dense student has no softmax"),
        ({"REG__MODE": "caware"}, 'REG.MODE is "caware"'),
        ({"HETERO_PRED__CLS": "softmax"}, "HETERO_PRED.CLS must be one of"),
        ({"HETERO_PRED__REG": "l2"}, "HETERO_PRED.REG must be one of"),
        ({"HETERO_PRED__REG": "l1", "REG__WEIGHT": -1.0}, "REG.WEIGHT must be at least 0"),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        terms(**values)


def test_other_classes_are_named():
    teacher = tiny_model("GeneralizedRCNN", **{"MODEL.ROI_HEADS.NUM_CLASSES": 5})
    with pytest.raises(ValueError, match="student has 3 .* and the teacher 5"):
        terms(teacher=teacher, HETERO_PRED__CLS="bce")
