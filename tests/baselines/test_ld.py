"""LD against hand-computed numbers and loops over single anchors."""

import math

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from kd_d2.baselines.ld import LD_OFFICIAL
from kd_d2.distillation import KDModel, build_distillers, build_tap
from kd_d2.modeling.layers import valid_anchor_mask
from tests.baselines.prediction_cases import check_two_steps
from tests.fixtures import DENSE, teacher_of, tiny_batch, tiny_cfg, tiny_model

ALL = ("main", "vlr", "cls")


def _model(student, teacher, arch="GFL", **options):
    dotted = {f"KD.LD.{k}": v for k, v in options.items()}
    cfg = tiny_cfg(arch, **{"KD.DISTILLERS": ("LD",), **dotted})
    distillers, schedules = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    return KDModel(student=student, distillers=distillers, teacher=teacher, schedules=schedules)


def _pair(arch="GFL"):
    return tiny_model(arch, 0), teacher_of(tiny_model(arch, 1))


def _losses(model, batch):
    with EventStorage(0):
        losses = model(batch)
    prefix = "loss_kd/ld/"
    return {k[len(prefix) :]: v for k, v in losses.items() if k.startswith(prefix)}


@torch.no_grad()
def _raw(model, batch):
    features = model.backbone(model.preprocess_image(batch).tensor)
    features = [features[f] for f in model.head_in_features]
    return features, model.head(features)


@torch.no_grad()
def _rows(levels, dim):
    """Per level (N, H*W*A, dim), cell by cell."""
    result = []
    for x in levels:
        n, c, h, w = x.shape
        x = x.reshape(n, c // dim, dim, h, w)
        result.append(x.permute(0, 3, 4, 1, 2).reshape(n, -1, dim))
    return result


def _kl(t, s, tau):
    p = F.softmax(t.double() / tau, dim=-1)
    q = F.softmax(s.double() / tau, dim=-1)
    return tau**2 * (p * (p / q).log()).mean(dim=-1)


def _box_iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0.0) * max(h, 0.0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return inter / (sum(areas) - inter)


def _box_diou(a, b):
    d = sum(((a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2) ** 2 for i in (0, 1))
    c = sum((max(a[i + 2], b[i + 2]) - min(a[i], b[i])) ** 2 for i in (0, 1))
    return _box_iou(a, b) - d / c


def naive_vlr(levels, gt, valid, gamma=0.25):
    """Weights of all anchors by the definition, one box and one anchor at a time."""
    anchors = torch.cat([x.tensor for x in levels]).tolist()
    result = [0.0] * len(anchors)
    for g in gt.tolist():
        candidates, start = [], 0
        for level in levels:
            stop = start + len(level)

            def distance(i):
                a = anchors[i]
                d = sum(((a[k] + a[k + 2] - g[k] - g[k + 2]) / 2) ** 2 for k in (0, 1))
                return d if valid[i] else math.inf

            nearest = sorted(range(start, stop), key=distance)[:9]
            candidates += [_box_iou(anchors[i], g) for i in nearest if valid[i]]
            start = stop
        mean = sum(candidates) / len(candidates)
        variance = sum((x - mean) ** 2 for x in candidates) / (len(candidates) - 1)
        threshold = mean + variance**0.5
        for i, a in enumerate(anchors):
            if valid[i] and gamma * threshold <= _box_diou(a, g) < threshold:
                result[i] = max(result[i], _box_iou(a, g))
    return torch.tensor(result)


# Detectors without distributions compare classes only
TERMS = {arch: ALL if arch == "GFL" else ("cls",) for arch in DENSE}


def test_follows_the_formulas():
    student, teacher = _pair()
    batch = tiny_batch()
    losses = _losses(_model(student, teacher), batch)

    features, (logits, boxes) = _raw(student, batch)
    _, (t_logits, t_boxes) = _raw(teacher.model, batch)
    anchors = student.anchor_generator(features)
    labels, _ = student.label_anchors(anchors, [x["instances"] for x in batch])
    labels = torch.stack(labels)
    s_cls, t_cls = _rows(logits, 3), _rows(t_logits, 3)
    s_box, t_box = (torch.cat(_rows(x, 68), 1).view(2, -1, 4, 17) for x in (boxes, t_boxes))
    side = _kl(t_box, s_box, 10.0)
    quality = torch.cat(s_cls, 1).sigmoid().amax(2)
    positive = (labels >= 0) & (labels < 3)
    assert positive.sum() > 5
    main = sum(quality[n, r] * side[n, r, k] / 4 for n, r in positive.nonzero() for k in range(4))
    assert losses["main"].item() == pytest.approx(0.25 * main.item(), rel=1e-4)

    vlr, count = 0.0, 0
    for n, x in enumerate(batch):
        weights = naive_vlr(anchors, x["instances"].gt_boxes.tensor, (labels[n] >= 0).tolist())
        count += (weights > 0).sum()
        vlr += (weights[:, None] * side[n]).sum() / 16
    assert count > 10
    assert losses["vlr"].item() == pytest.approx(0.25 * vlr.item(), rel=1e-4)

    cls, start = 0.0, 0
    for s, t in zip(s_cls, t_cls):
        mask = positive[:, start : start + s.shape[1]]
        start += s.shape[1]
        if mask.any():
            cls += _kl(t[mask], s[mask], 2.0).mean()
    assert losses["cls"].item() == pytest.approx(10 * cls.item(), rel=1e-4)


@pytest.mark.parametrize("arch", ["ATSS", "FCOS", "RetinaNet"])
def test_classes_alone_follow_the_formula(arch):
    student, teacher = _pair(arch)
    batch = tiny_batch()
    losses = _losses(_model(student, teacher, arch, TERMS=("cls",)), batch)
    assert set(losses) == {"cls"}
    features, outputs = _raw(student, batch)
    _, targets = _raw(teacher.model, batch)
    anchors = student.anchor_generator(features)
    labels, _ = student.label_anchors(anchors, [x["instances"] for x in batch])
    labels, expected, start = torch.stack(labels), 0.0, 0
    tau = {"RetinaNet": 8.0}.get(arch, 2.0)
    for s, t in zip(_rows(outputs[0], 3), _rows(targets[0], 3)):
        level = labels[:, start : start + s.shape[1]]
        start += s.shape[1]
        mask = (level >= 0) & (level < 3)
        if mask.any():
            expected += _kl(t[mask], s[mask], tau).mean()
    assert expected > 0
    assert losses["cls"].item() == pytest.approx(10 * expected.item(), rel=1e-4)


# official factors and divisors of the detectors: main / 4, valuable region / divisor
DISTRIBUTIONS = {"ATSS": (0.25, 0.25 * 0.15 / 4, 8.0), "FCOS": (0.25, 0.25 * 0.25 / 4, 1.0)}


@pytest.mark.parametrize("arch", DISTRIBUTIONS)
def test_distribution_heads_of_atss_and_fcos(arch):
    """FCOS: squares of 8 strides stand for its points, and the student's score is the weight."""
    bins = {f"MODEL.{arch}.REG_MAX": 16}
    student, teacher = tiny_model(arch, 0, **bins), teacher_of(tiny_model(arch, 1, **bins))
    batch = tiny_batch()
    losses = _losses(_model(student, teacher, arch), batch)
    assert set(losses) == set(ALL)
    features, (logits, boxes, *_) = _raw(student, batch)
    _, (_, t_boxes, *_) = _raw(teacher.model, batch)
    anchors = student.anchor_generator(features)
    labels, _ = student.label_anchors(anchors, [x["instances"] for x in batch])
    labels = torch.stack(labels)
    s_box, t_box = (torch.cat(_rows(x, 68), 1).view(2, -1, 4, 17) for x in (boxes, t_boxes))
    side = _kl(t_box, s_box, 10.0).sum(dim=2)
    quality = torch.cat(_rows(logits, 3), 1).sigmoid().amax(2)
    positive = (labels >= 0) & (labels < 3)
    main, vlr, scale = DISTRIBUTIONS[arch]
    expected = main * (quality * side)[positive].sum() / 4
    assert losses["main"].item() == pytest.approx(expected.item(), rel=1e-4)
    grown = [
        Boxes(torch.cat([c - 4 * w, c + 4 * w], 1))
        for c, w in (
            (a.get_centers(), (a.tensor[:, 2:] - a.tensor[:, :2]) / scale) for a in anchors
        )
    ]
    expected = 0.0
    for n, x in enumerate(batch):
        cells = valid_anchor_mask(
            anchors, [8, 16, 32, 64, 128], x["image"].shape[-2:], 32, 0.5 if arch == "FCOS" else 0.0
        )
        weights = naive_vlr(grown, x["instances"].gt_boxes.tensor, cells.tolist())
        assert (weights > 0).sum() > 5
        if arch == "FCOS":
            weights = (weights > 0) * quality[n]
        expected += vlr * (weights * side[n]).sum()
    assert losses["vlr"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_oracles():
    """Hand-computed: two bins, teacher (0, ln 3), student (0, 0); 17 bins; three classes."""
    from kd_d2.losses.soft_targets import kl_divergence

    two = torch.tensor([0.0, math.log(3)]), torch.zeros(2)
    assert kl_divergence(two[1], two[0], 10.0, "mean").item() == pytest.approx(0.075321, abs=2e-6)
    assert kl_divergence(two[1], two[0], 1.0, "mean").item() == pytest.approx(0.065406, abs=2e-6)
    peak = torch.zeros(17)
    peak[3] = 10.0
    assert kl_divergence(torch.zeros(17), peak, 10.0, "mean").item() == pytest.approx(
        0.287843, abs=1e-5
    )
    classes = torch.tensor([2.0, 0.0, 0.0])
    assert kl_divergence(torch.zeros(3), classes, 2.0, "mean").item() == pytest.approx(
        0.164379, abs=1e-6
    )


class _Constant:
    """A region for one row."""

    student_needs = teacher_needs = ()

    def __init__(self, value):
        self.value = value

    def __call__(self, ctx, pair):
        return pair.student.new_full(pair.positions[:2], self.value)


def test_four_sides_of_one_anchor():
    from kd_d2.baselines.ld import _main
    from kd_d2.blocks import Pair

    term = _main(LD_OFFICIAL["GFL"], "official")
    student = torch.zeros(1, 1, 4, 2)
    teacher = torch.tensor([0.0, math.log(3)]).expand(1, 1, 4, 2)
    term.source = lambda ctx: [Pair(student, teacher, False)]
    term.region = _Constant(0.5)
    assert 0.25 * term(None).item() == pytest.approx(0.25 * 0.5 * 0.075321, rel=1e-4)
    # a constant added to a row changes nothing
    student.add_(3.0)
    assert 0.25 * term(None).item() == pytest.approx(0.25 * 0.5 * 0.075321, rel=1e-4)


def test_vlr_of_a_toy():
    """4x4 cells of 8 pixels, one 16x16 anchor centred in each, an object at (0, 0, 24, 24)."""
    from kd_d2.blocks import VLR

    centers = torch.stack(torch.meshgrid(*[torch.arange(4) * 8 + 4.0] * 2, indexing="xy"), -1)
    centers = centers.reshape(-1, 2)
    anchors = [Boxes(torch.cat([centers - 8, centers + 8], 1))]
    valid = torch.ones(16, dtype=torch.bool)
    weights = VLR()._one_image(anchors, Boxes([[0.0, 0, 24, 24]]), valid).view(4, 4)
    expected = torch.zeros(4, 4)
    edge, corner = 0.3, 0.209302
    expected[:3, :3] = torch.tensor(
        [[corner, edge, corner], [edge, 0.0, edge], [corner, edge, corner]]
    )
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    assert torch.equal(
        VLR(weight="one")._one_image(anchors, Boxes([[0.0, 0, 24, 24]]), valid).view(4, 4),
        (expected > 0).float(),
    )
    # diagonals have a DIoU of .127669; the threshold is .353578
    assert VLR(gamma=0.4)._one_image(anchors, Boxes([[0.0, 0, 24, 24]]), valid).gt(0).sum() == 4
    assert VLR()._one_image(anchors, Boxes(torch.zeros(0, 4)), valid).sum() == 0


@pytest.mark.parametrize("arch", DENSE)
def test_a_student_that_is_its_teacher_has_no_loss(arch):
    student = tiny_model(arch, 0)
    model = _model(student, teacher_of(tiny_model(arch, 0)), arch, TERMS=TERMS[arch])
    for name, value in _losses(model, tiny_batch()).items():
        assert abs(value.item()) < 1e-4, name


def test_gradients_reach_what_they_should():
    student, teacher = _pair()
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    losses = _losses(_model(student, teacher), tiny_batch())
    names, parameters = zip(*student.named_parameters())

    def reached(loss):
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return {n for n, g in zip(names, grads) if g is not None and g.abs().sum() > 0}

    for term in ("main", "vlr"):  # q is a constant: no gradient into the classification branch
        found = reached(losses[term])
        assert not any(n.startswith(("head.cls_score", "head.cls_subnet")) for n in found)
        assert any(n.startswith("head.bbox_pred") for n in found)
        assert any(n.startswith("backbone.bottom_up") for n in found)
    found = reached(losses["cls"])
    assert "head.cls_score.weight" in found and "head.bbox_pred.weight" not in found
    assert all(p.grad is None for p in teacher.model.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.model.state_dict().items())


def test_official_sums_grow_with_the_images_and_per_image_does_not():
    student, teacher = _pair()
    one = tiny_batch(1)
    values = {}
    for norm in ("official", "per_image"):
        model = _model(student, teacher, NORM=norm)
        values[norm] = [_losses(model, one * n) for n in (1, 2)]
    for term in ("main", "vlr"):
        first, second = (x[term].item() for x in values["official"])
        assert second == pytest.approx(2 * first, rel=1e-4)
        assert [x[term].item() for x in values["per_image"]] == pytest.approx(
            [second] * 2, rel=1e-4
        )
    first, second = (x["cls"].item() for x in values["official"])
    assert second == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("arch", DENSE)
def test_no_ground_truth(arch):
    student, teacher = _pair(arch)
    model = _model(student, teacher, arch, TERMS=TERMS[arch])
    keys = set(_losses(model, tiny_batch()))
    losses = _losses(model, tiny_batch(num_gt=0))
    assert set(losses) == keys
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert value.item() == 0.0, name
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    student, teacher = _pair()
    model = _model(student, teacher)
    expected = _losses(model, tiny_batch())
    with torch.autocast("cpu", dtype):
        losses = _losses(model, tiny_batch())
    for name, value in losses.items():
        assert value.dtype == torch.float32 and value.isfinite()
        assert value.item() == pytest.approx(expected[name].item(), rel=0.2), name


@pytest.mark.parametrize("arch", DENSE)
def test_official_values(arch):
    student, teacher = _pair(arch)
    official = {
        "GFL": {"main": 0.25, "vlr": 0.25, "cls": 10.0},
        "ATSS": {"cls": 10.0},
        "FCOS": {"cls": 10.0},
        "RetinaNet": {"cls": 10.0},
    }
    model = _model(student, teacher, arch, TERMS=TERMS[arch])
    assert model.distillers["ld"].weights == official[arch]
    model = _model(student, teacher, arch, TERMS=TERMS[arch], CLS_WEIGHT=3.0)
    assert model.distillers["ld"].weights["cls"] == 3.0


@pytest.mark.parametrize("arch", DENSE)
def test_two_steps(arch):
    student, teacher = _pair(arch)
    model = _model(student, teacher, arch, TERMS=TERMS[arch] + ("gi",))
    check_two_steps(model, teacher, tiny_batch(num_gt=(3, 0)))


@pytest.mark.parametrize("arch", ["ATSS", "FCOS", "RetinaNet"])
def test_detectors_without_distributions(arch):
    with pytest.raises(ValueError, match=r"KD.LD.TERMS.*student predicts 4 numbers.*REG_MAX 16"):
        _model(*_pair(arch), arch)


@pytest.mark.parametrize("arch", DENSE)
def test_general_instances(arch):
    student, teacher = _pair(arch)
    model = _model(student, teacher, arch, TERMS=("cls", "gi"))
    batch = tiny_batch()
    value = _losses(model, batch)["gi"]
    region = model.distillers["ld"].pair_terms["gi"].region
    ours, theirs = _raw(student, batch)[0], _raw(teacher.model, batch)[0]
    with EventStorage(0), model.tap.observe(student, model._student_needs) as observation:
        student(batch)
    ctx = model._context(batch, observation, 0)
    start, expected = 0, 0.0
    found = torch.zeros(2, sum(len(x) for x in ctx.student["anchors"]), dtype=torch.bool)
    for row, instances in zip(found, region.instances(ctx)):
        row[instances.anchor] = True
    for anchors, s, t in zip(ctx.student["anchors"], ours, theirs):
        cells = found[:, start : start + len(anchors)].view(2, *s.shape[-2:], -1).any(dim=3)
        start += len(anchors)
        assert 0 < cells.sum(dim=(1, 2)).max() <= 10
        expected += (s - t).square().permute(0, 2, 3, 1)[cells].mean()
    assert value.item() == pytest.approx(2 * expected.item(), rel=1e-4)


def test_errors():
    student, teacher = _pair()
    for options, message in (
        ({"TERMS": ("main", "box")}, "KD.LD.TERMS must name some of"),
        ({"TERMS": ()}, "KD.LD.TERMS must name some of"),
        ({"NORM": "mean"}, "KD.LD.NORM"),
        ({"TAU": 0.0}, "KD.LD.TAU must be positive"),
        ({"MAIN_WEIGHT": -2.0}, "KD.LD.MAIN_WEIGHT"),
        ({"VLR_GAMMA": 1.0}, "gamma in"),
    ):
        with pytest.raises(ValueError, match=message):
            _model(student, teacher, **options)
    with pytest.raises(ValueError, match="LD has no values for.*GeneralizedRCNN"):
        rcnn = tiny_model("GeneralizedRCNN")
        _model(rcnn, teacher_of(tiny_model("GeneralizedRCNN", 1)), "GeneralizedRCNN")
    with pytest.raises(ValueError, match="'pred.box'.*channels differ|codec.*differ"):
        other = tiny_model("GFL", 1, **{"MODEL.GFL.REG_MAX": 8})
        _model(student, teacher_of(other))
