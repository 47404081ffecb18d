"""Calibration on a model whose gradients are known in closed form."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch import nn

from kd_d2.config import get_cfg
from kd_d2.distillation import KD_TAPS, Distiller, KDModel, LossSchedule, Tap, TapStore
from kd_d2.engine.calibration import (
    Spread,
    measure,
    step_gradients,
    training_update,
    warnings_of,
)

SIDE = 4
SIZE = SIDE * SIDE


class _Backbone(nn.Module):
    """p3 = w * image."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def output_shape(self):
        return {"p3": ShapeSpec(channels=1, stride=1)}

    def forward(self, images):
        return {"p3": self.w * images}


class ClosedFormDetector(nn.Module):
    """Its only loss is 3 * sum of the pyramid."""

    device = torch.device("cpu")

    def __init__(self, w=2.0):
        super().__init__()
        self.backbone = _Backbone(w)

    def forward(self, batched_inputs):
        images = torch.stack([x["image"] for x in batched_inputs])
        return {"loss_det": 3 * self.backbone(images)["p3"].sum()}


class _ClosedFormTap(Tap):
    def keys(self, model):
        return self.trunk_keys(model)

    def paths(self, model, keys):
        return {"backbone"}

    def read(self, store: TapStore, key):
        return self.read_trunk(store, key)


class Square(Distiller):
    """Terms are half the sum of squares of the pyramid, times what ``factors`` says."""

    needs_teacher = False

    def __init__(self, factors, weights=None):
        super().__init__(
            weights=weights or {term: 1.0 for term in factors}, student_needs=("neck.p3",)
        )
        self.factors = factors

    def compute(self, ctx):
        value = 0.5 * (ctx.student["neck.p3"] ** 2).sum()
        return {term: factor(ctx.iteration) * value for term, factor in self.factors.items()}


@pytest.fixture(autouse=True)
def tap():
    KD_TAPS.register_for(ClosedFormDetector)(_ClosedFormTap)
    yield
    del KD_TAPS._obj_map[ClosedFormDetector.__name__]


def kd_model(distillers, **kwargs):
    model = KDModel(student=ClosedFormDetector(), distillers=distillers, teacher=None, **kwargs)
    for label, distiller in model.distillers.items():
        distiller._label = label
    return model.train()


def batches(values=None):
    """Endless batches of one image of constant value."""
    i = 0
    while True:
        value = 1.0 if values is None else values[i % len(values)]
        instances = Instances((SIDE, SIDE), gt_boxes=Boxes(torch.zeros(0, 4)))
        yield [{"image": torch.full((1, SIDE, SIDE), value), "instances": instances}]
        i += 1


def by_name(pulls):
    return {pull.name: pull for pull in pulls}


def test_ratios_are_those_of_the_closed_form():
    """p3 = w x: |dL_det/dp3| = 3 sqrt(n), |dL_kd/dp3| = c w x sqrt(n); times x sqrt(n) for w."""
    distillers = {
        "a": Square({"one": lambda i: 1.0, "two": lambda i: 1.0}, {"one": 1.5, "two": 0.25}),
        "b": Square({"minus": lambda i: -1.0}),
    }
    images = [1.0, 2.0, 4.0]
    pulls = by_name(measure(kd_model(distillers), batches(images), 3))
    assert list(pulls) == ["a/one", "a/two", "a", "b/minus", "all distillers", "detection"]
    w, root = 2.0, SIZE**0.5
    for name, c in (("a/one", 1.5), ("a/two", 0.25), ("a", 1.75), ("b/minus", 1.0)):
        expected = [c * w * x / 3 for x in images]
        for group in ("pyramid", "parameters"):
            spread = pulls[name].ratios[group]
            assert spread.mean == pytest.approx(sum(expected) / 3)
            assert (spread.min, spread.max) == pytest.approx((expected[0], expected[2]))
            assert spread.median == pytest.approx(expected[1])
            assert spread.std == pytest.approx(torch.tensor(expected).std().item())
            # images are positive, so all gradients have one direction or the opposite one
            cosine = pulls[name].cosines[group]
            assert [cosine.min, cosine.max] == pytest.approx([-1 if name == "b/minus" else 1] * 2)
        assert pulls[name].norms["pyramid"].max == pytest.approx(c * w * 4 * root)
        assert pulls[name].norms["parameters"].max == pytest.approx(c * w * 16 * SIZE)
    # they pull in opposite directions: 1.75 - 1
    assert pulls["all distillers"].ratios["pyramid"].max == pytest.approx(0.75 * w * 4 / 3)
    assert pulls["detection"].norms["pyramid"].mean == pytest.approx(3 * root)
    assert pulls["a/one"].raw.max == pytest.approx(0.5 * (w * 4) ** 2 * SIZE)
    assert pulls["a/one"].weight == 1.5 and pulls["a"].weight is None and pulls["a"].raw is None
    assert warnings_of(list(pulls.values())) == []


def test_weights_do_not_change_unless_there_is_an_update():
    model = kd_model({"a": Square({"x": lambda i: 1.0})})
    measure(model, batches(), 2)
    w = model.student.backbone.w
    assert w.item() == 2.0 and w.grad is None
    cfg = get_cfg()
    solver = {"BASE_LR": 0.01, "MOMENTUM": 0.0, "WEIGHT_DECAY": 0.0, "WARMUP_ITERS": 0}
    cfg.merge_from_list([x for k, v in solver.items() for x in (f"SOLVER.{k}", v)])
    update = training_update(cfg, model)
    pulls = by_name(measure(model, batches(), 2, update=update))
    # d total / dw = 3 n + w n
    second = 2.0 - 0.01 * SIZE * (3 + 2.0)
    assert w.item() == pytest.approx(second - 0.01 * SIZE * (3 + second))
    assert pulls["a/x"].ratios["pyramid"].max == pytest.approx(2 / 3)
    assert pulls["a/x"].ratios["pyramid"].min == pytest.approx(second / 3)


def test_schedules_count_in_a_step_and_not_in_a_measurement():
    schedule = LossSchedule(0, 10, decay="linear")
    model = kd_model({"a": Square({"x": lambda i: 1.0})}, schedules={"a": schedule})
    gradients, raw, _ = step_gradients(model, next(batches()), 5)
    assert gradients["a/x"]["pyramid"].norm == pytest.approx(0.5 * 2 * SIZE**0.5)
    assert raw["a/x"] == pytest.approx(0.5 * 4 * SIZE)
    pulls = by_name(measure(model, batches(), 6))
    assert pulls["a/x"].ratios["pyramid"].min == pytest.approx(2 / 3)
    assert model.schedules == {"a": schedule}


def test_what_is_wrong_with_a_term_is_said():
    nan, zero = (lambda i: math.nan if i == 2 else 1.0), (lambda i: 0.0)
    distillers = {
        "broken": Square({"nan": nan}),
        "zero": Square({"all": zero, "off": lambda i: 1.0}, {"all": 1.0, "off": 0.0}),
        "spike": Square({"once": lambda i: 100.0 if i == 3 else 1.0}),
        "rare": Square({"now": lambda i: 1.0 if i == 4 else 0.0}),
    }
    pulls = measure(kd_model(distillers), batches(), 5)
    found = {text.split(":")[0]: text for text in warnings_of(pulls)}
    assert "NaN or infinite in 1 iterations (2)" in found["broken/nan"]
    assert "exactly 0 in every iteration" in found["zero/all"]
    assert "its weight is 0" in found["zero/off"]
    assert "up to 100 times the median" in found["spike/once"]
    assert "less than half of the iterations" in found["rare/now"]
    # what is broken is not part of the statistics
    assert by_name(pulls)["broken/nan"].ratios["pyramid"].mean == pytest.approx(2 / 3)
    assert by_name(pulls)["broken/nan"].ratios["pyramid"].broken == (2,)


class _Detached(Square):
    def compute(self, ctx):
        return {term: value.detach() for term, value in super().compute(ctx).items()}


def test_a_loss_without_gradient_is_said():
    pulls = measure(kd_model({"a": _Detached({"x": lambda i: 1.0})}), batches(), 2)
    assert warnings_of(pulls) == ["a/x: no gradient reaches the student"]


def test_a_detector_without_gradient_gives_no_ratio():
    model = kd_model({"a": Square({"x": lambda i: 1.0})})
    model.student.forward = lambda inputs: {
        "loss_det": 0
        * model.student.backbone(torch.stack([x["image"] for x in inputs]))["p3"].sum()
    }
    pulls = measure(model, batches(), 2)
    assert math.isnan(by_name(pulls)["a/x"].ratios["pyramid"].mean)
    assert math.isnan(by_name(pulls)["a/x"].cosines["pyramid"].mean)
    assert "detection: no gradient reaches the student" in warnings_of(pulls)


def test_nothing_to_measure_is_refused():
    model = kd_model({"a": Square({"x": lambda i: 1.0})})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        measure(model, batches(), 0)
    model.student.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the student is trained"):
        measure(model, batches(), 1)


def test_spread():
    spread = Spread.of([1.0, math.inf, 3.0, math.nan, 8.0])
    assert (spread.mean, spread.median, spread.min, spread.max) == (4.0, 3.0, 1.0, 8.0)
    assert spread.std == pytest.approx(13**0.5) and spread.broken == (1, 3)
    assert Spread.of([5.0]).std == 0.0
    assert math.isnan(Spread.of([math.nan]).mean)
