"""Mimic against loops over single anchors and hand-computed numbers."""

import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.structures import Boxes
from torch.nn import functional as F

from kd_d2.blocks import GIoU, LogIoU, Pair
from tests.baselines.feature_cases import kd_model, networks, run_step, terms_of
from tests.baselines.prediction_cases import check_two_steps, gradients_reach, predictions
from tests.fixtures import DENSE, teacher_of, tiny_batch, tiny_model


def _terms(arch, batch=None, pair=None, **options):
    student, teacher = pair or networks(arch)
    model = kd_model("Mimic", student, teacher, arch, **options)
    return terms_of(run_step(model, batch or tiny_batch()))


def _divisor(ours):
    return ours["positive"].sum(dim=1).clamp(min=1).sum().item()


def _valid(student, ours, batch):
    """(N, R) anchors of the cells that the image has by itself; sides are multiples of 32."""
    strides = [8, 16, 32, 64, 128]
    result = []
    for x in batch:
        height, width = (-(-side // 32) * 32 for side in x["image"].shape[1:])
        per_level = []
        for size, stride in zip(ours["sizes"], strides):
            side = 128 // stride
            mask = torch.zeros(side, side, dtype=torch.bool)
            mask[: math.ceil(height / stride), : math.ceil(width / stride)] = True
            per_level.append(mask.flatten().repeat_interleave(size // side**2))
        result.append(torch.cat(per_level))
    return torch.stack(result)


@pytest.mark.parametrize("arch", DENSE)
@pytest.mark.parametrize("loss", ["qfl", "bce", "kl"])
def test_classes(arch, loss):
    pair, batch = networks(arch), tiny_batch()
    value = _terms(arch, batch, pair, CLS_LOSS=loss, CLS_TAU=2.0, BOX_LOSS="none")["cls"]
    ours, theirs = (predictions(m, batch) for m in (pair[0], pair[1].model))
    s, t = ours["cls"].double(), theirs["cls"].double()
    p, q = s.sigmoid(), t.sigmoid()
    entropy = -(q * p.log() + (1 - q) * (1 - p).log())
    expected = {
        "bce": entropy.sum(2),
        "qfl": ((p - q).abs() * entropy).sum(2),
        "kl": 4
        * (F.softmax(t / 2, 2) * (F.log_softmax(t / 2, 2) - F.log_softmax(s / 2, 2))).sum(2),
    }[loss]
    valid = _valid(pair[0], ours, batch)
    assert not valid[1].all() and valid[0].all()
    expected = expected[valid].sum() / _divisor(ours)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def _giou(a, b):
    overlap = [max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    inter = overlap[0] * overlap[1]
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - inter
    hull = [max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1)]
    hull = hull[0] * hull[1]
    return inter / union - (hull - union) / hull


@pytest.mark.parametrize("arch", DENSE)
@pytest.mark.parametrize("loss", ["giou", "l1", "bounded"])
def test_boxes(arch, loss):
    pair, batch = networks(arch), tiny_batch()
    value = _terms(arch, batch, pair, BOX_LOSS=loss, CLS_LOSS="none", BOX_MARGIN=0.01)["box"]
    ours, theirs = (predictions(m, batch) for m in (pair[0], pair[1].model))
    codec, expected, counted = pair[0].box2box_transform, 0.0, 0
    for n, r in ours["positive"].nonzero().tolist():
        raw = [x["box"][n, r][None] for x in (ours, theirs)]
        s, t = (codec.apply_deltas(x, ours["anchors"][r][None])[0].tolist() for x in raw)
        if loss == "giou":
            expected += 1 - _giou(s, t)
        elif loss == "l1":
            if arch == "GFL":
                bins = torch.arange(17.0)
                raw = [(x.view(4, 17).softmax(1) * bins).sum(1) for x in raw]
            expected += (raw[0] - raw[1]).abs().sum().item()
        else:
            g = ours["matched"][n, r].tolist()
            sides = (g[2] - g[0], g[3] - g[1]) * 2
            errors = [sum(((a - b) / w) ** 2 for a, b, w in zip(x, g, sides)) for x in (s, t)]
            worse = errors[0] + 0.01 > errors[1]
            counted += worse
            expected += errors[0] if worse else 0.0
    assert loss != "bounded" or 0 < counted < ours["positive"].sum()
    assert value.item() == pytest.approx(expected / _divisor(ours), rel=2e-4)


def test_log_iou_in_the_order_of_the_anchors():
    """A level by itself is decoded with its own anchors; [0,0,2,2] and [1,1,3,3]: ln 7."""

    class Shift:
        @staticmethod
        def apply_deltas(raw, anchors):
            return anchors + raw

    levels = [Boxes([[0.0, 0, 8, 8]]), Boxes([[0.0, 0, 2, 2]])]
    ctx = SimpleNamespace(student={"anchors": levels, "codec": Shift})
    student, teacher = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    teacher[0, 1] = 1.0
    values = LogIoU()(ctx, Pair(student, teacher, False))
    assert values.shape == (1, 2) and values[0].tolist() == pytest.approx([0.0, math.log(7)])
    one = Pair(student[:, 1:], teacher[:, 1:], False, level=1)
    assert LogIoU()(ctx, one).tolist() == [[pytest.approx(math.log(7))]]
    assert GIoU()(ctx, one).tolist() == [[pytest.approx(1.079365, abs=1e-6)]]


def test_distributions_of_gfl():
    pair, batch = networks("GFL"), tiny_batch()
    value = _terms("GFL", batch, pair, BOX_LOSS="kl", CLS_LOSS="none", BOX_TAU=3.0)["box"]
    ours, theirs = (predictions(m, batch) for m in (pair[0], pair[1].model))
    s, t = (x["box"][ours["positive"]].view(-1, 4, 17).double() / 3 for x in (ours, theirs))
    expected = 9 * (F.softmax(t, -1) * (F.log_softmax(t, -1) - F.log_softmax(s, -1))).sum()
    assert value.item() == pytest.approx(expected.item() / _divisor(ours), rel=1e-4)


@pytest.mark.parametrize("arch", ["FCOS", "ATSS"])
def test_centerness(arch):
    pair, batch = networks(arch), tiny_batch()
    value = _terms(arch, batch, pair, CTR_WEIGHT=0.5)["ctr"]
    ours, theirs = (predictions(m, batch) for m in (pair[0], pair[1].model))
    mask = ours["positive"]
    p, q = (x["ctr"][..., 0][mask].double().sigmoid() for x in (ours, theirs))
    expected = -(q * p.log() + (1 - q) * (1 - p).log()).sum() / _divisor(ours)
    assert value.item() == pytest.approx(0.5 * expected.item(), rel=1e-4)


@pytest.mark.parametrize("arch", DENSE)
def test_student_that_is_its_teacher(arch):
    pair = tiny_model(arch, 0), teacher_of(tiny_model(arch, 0))
    for loss in ("qfl", "kl"):
        assert abs(_terms(arch, pair=pair, CLS_LOSS=loss)["cls"].item()) < 1e-4
    for loss in ("l1", "giou"):
        assert abs(_terms(arch, pair=pair, BOX_LOSS=loss)["box"].item()) < 1e-4
    assert _terms(arch, pair=pair, CLS_LOSS="bce")["cls"].item() > 0.1


def test_gradients():
    student, teacher = networks("GFL")
    terms = terms_of(run_step(kd_model("Mimic", student, teacher), tiny_batch()))
    found = gradients_reach(terms["cls"], student)
    assert "head.cls_score.weight" in found and "head.bbox_pred.weight" not in found
    found = gradients_reach(terms["box"], student)
    assert "head.bbox_pred.weight" in found and "head.cls_score.weight" not in found


@pytest.mark.parametrize("arch", DENSE)
def test_two_steps(arch):
    student, teacher = networks(arch)
    ctr = {"CTR_WEIGHT": 1.0} if arch in ("FCOS", "ATSS") else {}
    model = kd_model("Mimic", student, teacher, arch, **ctr)
    check_two_steps(model, teacher, tiny_batch())


@pytest.mark.parametrize("loss", ["l1", "giou", "bounded", "kl"])
def test_no_ground_truth(loss):
    terms = _terms("GFL", tiny_batch(num_gt=0), BOX_LOSS=loss)
    assert set(terms) == {"cls", "box"} and terms["cls"] > 0 and terms["box"] == 0
    assert terms["box"].requires_grad
    student, teacher = networks("GFL")
    check_two_steps(
        kd_model("Mimic", student, teacher, BOX_LOSS=loss), teacher, tiny_batch(num_gt=0)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", DENSE)
def test_half_precision(arch, dtype):
    expected = _terms(arch)
    with torch.autocast("cpu", dtype):
        terms = _terms(arch)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[name].item(), rel=0.15), name


def test_errors():
    for options, message in (
        ({"CLS_LOSS": "mse"}, "KD.MIMIC.CLS_LOSS"),
        ({"BOX_LOSS": "l2"}, "KD.MIMIC.BOX_LOSS"),
        ({"CLS_LOSS": "none", "BOX_LOSS": "none"}, "choose a term"),
        ({"CTR_WEIGHT": 1.0}, "pred.ctr"),
        ({"BOX_LOSS": "bounded", "BOX_MARGIN": -1.0}, "margin"),
    ):
        with pytest.raises(ValueError, match=message):
            _terms("GFL", **options)
    with pytest.raises(ValueError, match="distributions"):
        _terms("ATSS", BOX_LOSS="kl")
    with pytest.raises(ValueError, match="dense detectors"):
        _terms("GeneralizedRCNN")
