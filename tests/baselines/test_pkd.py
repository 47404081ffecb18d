"""PKD against its formula, on towers and pyramid of real detectors."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from kd_d2.baselines import PKD
from kd_d2.distillation import KDModel, build_distillers, build_tap
from tests.fixtures import teacher_of, tiny_batch, tiny_cfg, tiny_model


def _pair(arch="GFL", num_convs=2, **teacher_overrides):
    own = {f"MODEL.{arch.upper()}.NUM_CONVS": num_convs}
    student = tiny_model(arch, 0, **own)
    return student, teacher_of(tiny_model(arch, 1, **{**own, **teacher_overrides}))


def _model(student, teacher, arch="GFL", **options):
    dotted = {f"KD.PKD.{k}": v for k, v in options.items()}
    cfg = tiny_cfg(arch, **{"KD.DISTILLERS": ("PKD",), **dotted})
    distillers, schedules = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    return KDModel(student=student, distillers=distillers, teacher=teacher, schedules=schedules)


def _loss(model, batch):
    with EventStorage(0):
        return model(batch)["loss_kd/pkd/feat"]


def _gradients(loss, student):
    names, parameters = zip(*student.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


@torch.no_grad()
def _pearson_form(a, b):
    """Mean over channels of (1 - r)(M - 1)/M, with torch's own correlation."""
    total, channels = 0.0, a.shape[1]
    for c in range(channels):
        x, y = a[:, c].flatten(), b[:, c].flatten()
        m = x.numel()
        if x.std() < 1e-6 or y.std() < 1e-6:  # a constant becomes 0, the other one stays
            total += 0.5 * (m - 1) / m * sum(float(v.std() >= 1e-6) for v in (x, y))
        else:
            total += (1 - torch.corrcoef(torch.stack([x, y]).double())[0, 1]) * (m - 1) / m
    return total / channels


def _features(model, batch, location, stage=0):
    with torch.no_grad():
        levels = model.backbone(model.preprocess_image(batch).tensor)
        levels = [levels[f] for f in model.head_in_features]
        if location == "neck":
            return levels
        tower = {"cls": model.head.cls_subnet, "reg": model.head.bbox_subnet}[location]
        ends = [i + 1 for i, m in enumerate(tower) if isinstance(m, torch.nn.ReLU)]
        return [tower[: ends[stage - 1]](x) for x in levels]


@pytest.mark.parametrize(
    "locations, stage",
    [(("neck",), 3), (("cls",), 1), (("reg",), 2), (("cls", "reg"), 2), (("neck", "cls"), 1)],
)
@pytest.mark.parametrize("arch", ["GFL", "RetinaNet"])
def test_follows_the_formula(arch, locations, stage):
    student, teacher = _pair(arch)
    batch = tiny_batch(sizes=((160, 160), (96, 160)))  # no level of a single cell
    model = _model(student, teacher, arch, LOCATIONS=locations, STAGE=stage, WEIGHT=2.5)
    expected = sum(
        _pearson_form(a, b)
        for location in locations
        for a, b in zip(
            _features(student, batch, location, stage),
            _features(teacher.model, batch, location, stage),
        )
    )
    assert _loss(model, batch).item() == pytest.approx(2.5 * expected.item(), rel=2e-4)


def test_worked_out():
    """[0, 1, 2, 3] against [0, 0, 4, 4]: r = 0.894427, hence 0.079180 a level."""
    student = torch.arange(4.0).reshape(1, 1, 2, 2)
    teacher = torch.tensor([0.0, 0.0, 4.0, 4.0]).reshape(1, 1, 2, 2)
    distiller = PKD(pairs=[("neck", "neck")], weight=6.0)
    ctx = type("Context", (), {})()
    ctx.student, ctx.teacher, ctx.raw = {"neck": [student] * 5}, {"neck": [teacher] * 5}, {}
    assert distiller(ctx)["feat"].item() == pytest.approx(6 * 5 * 0.079180, abs=1e-4)
    assert ctx.raw["pkd/feat"].item() == pytest.approx(5 * 0.079180, abs=1e-5)


def test_official_defaults():
    """The official weight for GFL on the pyramid; stage 3 of the towers (CrossKD's Table 2)."""
    node = tiny_cfg("GFL").KD.PKD
    assert (node.LOCATIONS, node.WEIGHT, node.STAGE) == (("neck",), 6.0, 3)
    student, teacher = _pair(num_convs=4)
    distiller = _model(student, teacher, LOCATIONS=("neck", "cls", "reg")).distillers["pkd"]
    assert distiller.pairs == [(k, k) for k in ("neck", "head.cls[3]", "head.box[3]")]
    assert distiller.weights == {"feat": 6.0}


def test_gradient_support():
    """Tower features reach their stages and what lies before, nothing else; the teacher nothing."""
    student, teacher = _pair()
    found = _gradients(
        _loss(_model(student, teacher, LOCATIONS=("cls",), STAGE=1), tiny_batch()), student
    )
    for name, gradient in found.items():
        reached = name.startswith("backbone.") or name.startswith(
            ("head.cls_subnet.0", "head.cls_subnet.1.")
        )
        assert (gradient is not None) == reached, name
        if reached and gradient.dim() > 1:
            assert gradient.abs().max() > 0, name
    neck = _gradients(_loss(_model(student, teacher), tiny_batch()), student)
    assert all((g is not None) == n.startswith("backbone.") for n, g in neck.items())
    assert all(p.grad is None for p in teacher.model.parameters())


def test_features_that_correlate_cost_nothing():
    student, _ = _pair()
    twin = tiny_model("GFL", 0)
    with torch.no_grad():
        for level in (3, 4, 5):
            layer = getattr(twin.backbone, f"fpn_output{level}")
            layer.weight.mul_(3.0)
            layer.bias.mul_(3.0).add_(0.5)
    model = _model(student, teacher_of(twin))
    levels = [f"p{i}" for i in (3, 4, 5)]
    model.distillers["pkd"].pairs = [(f"neck.{name}", f"neck.{name}") for name in levels]
    ctx = type("Context", (), {})()
    sides = []
    for network in (student, twin):
        out = network.backbone(network.preprocess_image(tiny_batch()).tensor)
        sides.append({f"neck.{name}": [out[name]] for name in levels})
    ctx.student, ctx.teacher, ctx.raw = *sides, {}
    assert model.distillers["pkd"].compute(ctx)["feat"].item() < 1e-5


def test_half_precision():
    student, teacher = _pair()
    model = _model(student, teacher, LOCATIONS=("neck", "cls"), STAGE=1)
    full = _loss(model, tiny_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = _loss(model, tiny_batch())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0)


def test_resizing():
    """A finer student is resized; with RESIZE False the strides must agree, at build time."""
    student, _ = _pair()
    teacher = teacher_of(tiny_model("GFL", 1, **{"MODEL.GFL.IN_FEATURES": ["p4", "p5", "p6"]}))
    student.head_in_features = ["p3", "p4", "p5"]
    student.head.num_levels = 3
    model = _model(student, teacher)
    ctx = type("Context", (), {})()
    sides = []
    for network, names in ((student, ["p3", "p4"]), (teacher.model, ["p4", "p5"])):
        out = network.backbone(network.preprocess_image(tiny_batch()).tensor)
        sides.append({"neck": [out[name] for name in names]})
    ctx.student, ctx.teacher, ctx.raw = *sides, {}
    expected = sum(
        _pearson_form(torch.nn.functional.avg_pool2d(a, 2), b)
        for a, b in zip(*(s["neck"] for s in sides))
    )  # bilinear by exactly one half is the mean of four cells
    assert model.distillers["pkd"].compute(ctx)["feat"].item() == pytest.approx(
        expected.item(), rel=1e-4
    )
    with pytest.raises(ValueError, match=r"'neck'.* strides differ: student \(8, 16, 32\)"):
        _model(student, teacher, RESIZE=False)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"LOCATIONS": ("cls",)},
            r"KD.PKD.STAGE is 3, but tower 'cls' of the student has 2 stages",
        ),
        ({"LOCATIONS": ("reg",), "STAGE": 0}, r"KD.PKD.STAGE is 0, but tower 'reg'"),
        ({"LOCATIONS": ("box",)}, "LOCATIONS knows 'neck', 'cls' and 'reg', got 'box'"),
        ({"LOCATIONS": ()}, "LOCATIONS must not be empty"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        _model(*_pair(), **options)


@pytest.mark.parametrize(
    "overrides, options, message",
    [
        ({"MODEL.FPN.OUT_CHANNELS": 64}, {}, "'neck'.* channels differ: student 32, teacher 64"),
        (
            {"MODEL.GFL.CONV_DIM": 32},
            {"LOCATIONS": ("cls",), "STAGE": 1},
            r"'head.cls\[1\]'.* channels differ: student 64, teacher 32",
        ),
        (
            {"MODEL.GFL.NUM_CONVS": 1},
            {"LOCATIONS": ("cls",), "STAGE": 2},
            "KD.PKD.STAGE is 2, but tower 'cls' of the teacher has 1 stages",
        ),
        ({"MODEL.GFL.IN_FEATURES": ["p3", "p4"]}, {}, "student has 5 and the teacher 2"),
    ],
)
def test_networks_that_differ(overrides, options, message):
    with pytest.raises(ValueError, match=message):
        _model(*_pair(**overrides), **options)


def test_levels_by_index():
    """Faster R-CNN's P2-P5 teach RetinaNet's P3-P6 (the official pairing), the student resized."""
    student = tiny_model("RetinaNet", 0)
    teacher = teacher_of(tiny_model("GeneralizedRCNN", 1))
    with pytest.raises(ValueError, match="student has 5 and the teacher 4; .*KD.PKD.LEVELS"):
        _model(student, teacher, "RetinaNet")
    with pytest.raises(ValueError, match=r"KD.PKD.LEVELS is \(4,\), .* 5 levels and the teacher 4"):
        _model(student, teacher, "RetinaNet", LEVELS=(4,))
    with pytest.raises(ValueError, match=r"strides differ: student \(8, 16, 32, 64\), teacher"):
        _model(student, teacher, "RetinaNet", LEVELS=(0, 1, 2, 3), RESIZE=False)
    batch = tiny_batch(sizes=((128, 128),))
    model = _model(student, teacher, "RetinaNet", LEVELS=(0, 1, 2, 3), WEIGHT=1.0)
    sides = []
    with torch.no_grad():
        for network, names in (
            (student, ("p3", "p4", "p5", "p6")),
            (teacher.model, ("p2", "p3", "p4", "p5")),
        ):
            out = network.backbone(network.preprocess_image(batch).tensor)
            sides.append([out[name] for name in names])
        expected = sum(
            _pearson_form(torch.nn.functional.interpolate(a, scale_factor=2.0, mode="bilinear"), b)
            for a, b in zip(*sides)
        )
    assert _loss(model, batch).item() == pytest.approx(expected.item(), rel=1e-3)


def test_oracle_numbers():
    """Constant student 0.375, opposite maps 1.95, statistics of the batch and not of the image."""

    def value(student, teacher):
        distiller = PKD(pairs=[("neck", "neck")], weight=1.0)
        ctx = type("Context", (), {})()
        ctx.student, ctx.teacher, ctx.raw = {"neck": [student]}, {"neck": [teacher]}, {}
        return distiller(ctx)["feat"].item()

    four = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2)
    swapped = torch.tensor([1.0, 3.0, 2.0, 4.0]).reshape(1, 1, 2, 2)
    assert value(swapped, four) == pytest.approx(0.15, abs=1e-5)
    assert value(torch.ones(1, 1, 2, 2), four) == pytest.approx(0.375, abs=1e-5)
    torch.manual_seed(0)
    maps = torch.randn(2, 3, 4, 5)
    assert value(-maps, maps) == pytest.approx(1.95, abs=1e-4)
    scales = torch.tensor([0.5, 2.0, 7.0]).reshape(1, 3, 1, 1)
    assert value(scales * maps + scales - 3, maps) < 1e-9
    students = torch.cat([3 * four, four])
    assert value(students, torch.cat([four, 10 * four + 5])) == pytest.approx(1.284091, abs=1e-5)


@pytest.mark.parametrize("weight, levels", [(6.0, (0, 1, 2, 3)), (10.0, (0, 1, 2, 3)), (2.0, ())])
def test_official_weights_are_reachable(weight, levels):
    distiller = _model(*_pair(), WEIGHT=weight, LEVELS=levels).distillers["pkd"]
    assert distiller.weights == {"feat": weight} and distiller.levels == levels
