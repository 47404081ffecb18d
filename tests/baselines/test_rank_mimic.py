"""RankMimic against a loop over objects and hand-computed numbers."""

from types import SimpleNamespace

import pytest
import torch

from kd_d2.blocks import Objects, Pair, RankKL
from kd_d2.distillation import Assignment
from tests.baselines.feature_cases import kd_model, networks, run_step, terms_of
from tests.baselines.prediction_cases import check_two_steps, gradients_reach, predictions
from tests.fixtures import DENSE, teacher_of, tiny_batch, tiny_model

BOTH = ("score", "iou")


def _terms(arch, batch=None, pair=None, **options):
    student, teacher = pair or networks(arch)
    model = kd_model("RankMimic", student, teacher, arch, **options)
    return terms_of(run_step(model, batch or tiny_batch()))


def _toy(student, teacher, labels, boxes):
    """RankKL of scores (one class), divided by the number of objects."""
    logits = [torch.tensor(x).double().logit().view(1, -1, 1) for x in (student, teacher)]
    found = Assignment(torch.tensor([labels]), torch.tensor([boxes], dtype=torch.float32), 1)
    memory = {}
    ctx = SimpleNamespace(student={"assign": found}, memo=lambda k, f: memory.setdefault(k, f()))
    pair = Pair(*logits, False)
    values = RankKL()(ctx, pair)
    return values.sum() / Objects()(ctx, pair, values)


def test_worked_out():
    one = [[0, 0, 8, 8]] * 3
    value = _toy((0.1, 0.5, 0.9), (0.9, 0.5, 0.1), [0, 0, 0], one)
    assert value.item() == pytest.approx(0.207835, abs=1e-6)
    # a common shift does not change the ranking
    assert _toy((0.2, 0.6, 0.4), (0.3, 0.7, 0.5), [0, 0, 0], one).item() == pytest.approx(
        0, abs=1e-9
    )
    # background and ignored positions do not take part
    more = one + [[0, 0, 8, 8]] * 2
    value = _toy((0.1, 0.5, 0.9, 0.3, 0.8), (0.9, 0.5, 0.1, 0.9, 0.1), [0, 0, 0, 1, -1], more)
    assert value.item() == pytest.approx(0.207835, abs=1e-6)
    # two objects: the mean; an object with one positive costs nothing
    two = one + [[1, 1, 9, 9]]
    value = _toy((0.1, 0.5, 0.9, 0.4), (0.9, 0.5, 0.1, 0.7), [0, 0, 0, 0], two)
    assert value.item() == pytest.approx(0.207835 / 2, abs=1e-6)


def _iou(a, b):
    overlap = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    inter = overlap[0] * overlap[1]
    return inter / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - inter)


@pytest.mark.parametrize("arch", DENSE)
def test_follows_the_definition(arch):
    pair, batch = networks(arch), tiny_batch()
    terms = _terms(arch, batch, pair, QUALITIES=BOTH, WEIGHT=3.0)
    ours, theirs = (predictions(m, batch) for m in (pair[0], pair[1].model))
    codec = pair[0].box2box_transform
    expected, objects = dict.fromkeys(BOTH, 0.0), 0
    for n, x in enumerate(batch):
        gt = x["instances"]
        for box, label in zip(gt.gt_boxes.tensor, gt.gt_classes.tolist()):
            mine = ours["positive"][n] & (ours["labels"][n] == label)
            mine &= (ours["matched"][n] == box).all(dim=1)
            if not mine.any():
                continue
            objects += 1
            anchors = ours["anchors"][mine]
            for name in BOTH:
                sides = []
                for side in (ours, theirs):
                    if name == "score":
                        q = side["cls"][n][mine][:, label].sigmoid()
                    else:
                        boxes = codec.apply_deltas(side["box"][n][mine], anchors)
                        q = torch.tensor([_iou(b, box.tolist()) for b in boxes.tolist()])
                    sides.append(q.double().softmax(0))
                s, t = sides
                expected[name] += (t * (t / s).log()).sum().item()
    assert objects > 2
    for name in BOTH:
        value = terms[name].item()
        assert value == pytest.approx(3 * expected[name] / objects, rel=1e-3, abs=2e-6), name
        assert value > 0


@pytest.mark.parametrize("arch", DENSE)
def test_student_that_is_its_teacher(arch):
    pair = tiny_model(arch, 0), teacher_of(tiny_model(arch, 0))
    for value in _terms(arch, pair=pair, QUALITIES=BOTH).values():
        assert abs(value.item()) < 1e-6


def test_gradients():
    student, teacher = networks("GFL")
    terms = terms_of(
        run_step(kd_model("RankMimic", student, teacher, QUALITIES=BOTH), tiny_batch())
    )
    assert "head.bbox_pred.weight" not in gradients_reach(terms["score"], student)
    assert "head.cls_score.weight" in gradients_reach(terms["score"], student)
    assert "head.bbox_pred.weight" in gradients_reach(terms["iou"], student)
    assert "head.cls_score.weight" not in gradients_reach(terms["iou"], student)


@pytest.mark.parametrize("arch", DENSE)
@pytest.mark.parametrize("num_gt", [(3, 0), 0])
def test_two_steps(arch, num_gt):
    student, teacher = networks(arch)
    model = kd_model("RankMimic", student, teacher, arch, QUALITIES=BOTH)
    check_two_steps(model, teacher, tiny_batch(num_gt=num_gt))
    if num_gt == 0:
        terms = terms_of(run_step(model, tiny_batch(num_gt=0)))
        assert all(value.item() == 0 and value.requires_grad for value in terms.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    expected = _terms("GFL", QUALITIES=BOTH)
    with torch.autocast("cpu", dtype):
        terms = _terms("GFL", QUALITIES=BOTH)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=0.3), name


def test_errors():
    for options, message in (
        ({"QUALITIES": ()}, "KD.RANKMIMIC.QUALITIES is empty"),
        ({"QUALITIES": ("ctr",)}, "KD.RANKMIMIC.QUALITIES must be one of"),
        ({"TAU": 0.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            _terms("GFL", **options)
    with pytest.raises(ValueError, match="dense detectors"):
        _terms("GeneralizedRCNN")
