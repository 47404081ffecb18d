"""Keys of weights are found whatever they are called, and the suggested values reach the target."""

import pytest
from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES, add_schedule_config, get_cfg
from kd_d2.distillation import (
    DISTILLER_REGISTRY,
    Distiller,
    KDModel,
    build_distillers,
    build_tap,
)
from kd_d2.engine.calibration import Pull, Spread
from kd_d2.engine.weight_suggestions import power_of_two, suggest, weight_keys
from tests.engine.support import isolated_registries
from tests.fixtures import teacher_of, tiny_cfg, tiny_model


class Odd(Distiller):
    """Weights made of several keys."""

    def __init__(self, cfg, student_keys, teacher_keys):
        node = cfg.KD.ODD
        if node.STAGE > 1:
            raise ValueError("no such stage")
        super().__init__(
            weights={
                "x": node.LAMBDA * node.PART,
                "y": node.LAMBDA * node.TAU**2,
                "off": 0.0,
            },
            student_needs=(),
        )


@pytest.fixture
def odd():
    def add_odd_config(cfg):
        cfg.KD.ODD = CN({"LAMBDA": 2, "PART": 0.5, "TAU": 1.0, "STAGE": 1, "ON": True})
        cfg.KD.SECOND = cfg.KD.ODD.clone()
        cfg.KD.SECOND.LAMBDA = 8
        add_schedule_config(cfg.KD.ODD)
        add_schedule_config(cfg.KD.SECOND)

    with isolated_registries():
        CONFIG_NODES._do_register("add_odd_config", add_odd_config)
        DISTILLER_REGISTRY._do_register("Odd", Odd)
        yield


def built(cfg):
    student = tiny_model("GFL")
    teacher = teacher_of(tiny_model("GFL", seed=1))
    distillers, schedules = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    return KDModel(student=student, distillers=distillers, teacher=teacher, schedules=schedules)


def pull(name, ratio, **kwargs):
    spread = Spread(ratio, 0.0, ratio, ratio, ratio)
    return Pull(name, None, None, {"pyramid": spread}, {"pyramid": spread}, {})


TERMS = CN(
    {
        "feat": {"SOURCE": "MapSource('neck')", "WEIGHT": 0.5},
        "cls": {"SOURCE": "DenseSource('cls')", "DISTANCE": "BCE()", "WEIGHT": 2},
    }
)


def test_keys_of_shipped_methods():
    cfg = tiny_cfg("GFL", **{"KD.DISTILLERS": ("CrossKD", "PKD", "Pair"), "KD.CROSSKD.POSITION": 1})
    cfg.KD.PAIR.TERMS = TERMS.clone()
    assert weight_keys(cfg, built(cfg)) == {
        "crosskd": {"KD.CROSSKD.CLS_WEIGHT": {"cls": 1.0}, "KD.CROSSKD.REG_WEIGHT": {"reg": 1.0}},
        "pkd": {"KD.PKD.WEIGHT": {"feat": 1.0}},
        "pair": {
            "KD.PAIR.TERMS.feat.WEIGHT": {"feat": 1.0},
            "KD.PAIR.TERMS.cls.WEIGHT": {"cls": 1.0},
        },
    }
    assert cfg.KD.PKD.WEIGHT == 6.0 and cfg.KD.DISTILLERS == ("CrossKD", "PKD", "Pair")


def test_suggestions_reach_the_target_and_keep_the_balance():
    cfg = tiny_cfg("GFL", **{"KD.DISTILLERS": ("CrossKD", "PKD"), "KD.CROSSKD.POSITION": 1})
    ratios = {"crosskd/cls": 0.1, "crosskd/reg": 0.4, "crosskd": 0.5, "pkd/feat": 3.0}
    pulls = [pull(k, v) for k, v in {**ratios, "detection": 1.0}.items()]
    cross, pkd = suggest(cfg, built(cfg), pulls, target=2.0)
    assert (cross.label, cross.measured, cross.factor) == ("crosskd", 0.5, 4.0)
    # preset "official" of GFL: 1 and 4, written as -1
    assert [(c.key, c.now, c.suggested) for c in cross.changes] == [
        ("KD.CROSSKD.CLS_WEIGHT", -1.0, pytest.approx(4.0)),
        ("KD.CROSSKD.REG_WEIGHT", -1.0, pytest.approx(16.0)),
    ]
    assert cross.alone == pytest.approx({"cls": 20.0, "reg": 20.0})
    (change,) = pkd.changes
    assert (change.key, change.now, change.suggested) == ("KD.PKD.WEIGHT", 6.0, pytest.approx(4.0))
    with pytest.raises(ValueError, match="must be positive"):
        suggest(cfg, built(cfg), pulls, target=0.0)


def test_one_key_for_several_terms_and_labels_of_their_own(odd):
    cfg = get_cfg()
    cfg.KD.DISTILLERS = ("Odd", "Odd/second")
    model = built(cfg)
    keys = {"KD.ODD.LAMBDA": {"x": 0.5, "y": 1.0}, "KD.ODD.PART": {"x": 2.0}}
    second = {"KD.SECOND.LAMBDA": {"x": 0.5, "y": 1.0}, "KD.SECOND.PART": {"x": 8.0}}
    assert weight_keys(cfg, model) == {"odd": keys, "second": second}
    names = ("odd/x", "odd/y", "odd/off", "odd", "second/x", "second/y", "second/off", "second")
    pulls = [pull(name, 0.25) for name in (*names, "detection")]
    first, other = suggest(cfg, model, pulls, target=0.5)
    # LAMBDA alone scales both terms; PART would scale one of them twice
    assert [(c.key, c.now, c.suggested) for c in first.changes] == [("KD.ODD.LAMBDA", 2, 4.0)]
    assert [(c.key, c.now, c.suggested) for c in other.changes] == [("KD.SECOND.LAMBDA", 8, 16.0)]
    assert first.alone == {"x": 2.0, "y": 4.0}  # "off" has no weight to scale


def test_without_a_gradient_nothing_is_suggested():
    cfg = tiny_cfg("GFL", **{"KD.DISTILLERS": ("PKD",)})
    (item,) = suggest(cfg, built(cfg), [pull("pkd/feat", 0.0), pull("detection", 1.0)], 1.0)
    assert item.changes == () and item.factor != item.factor


def test_each_term_reaches_its_own_target(odd, monkeypatch):
    monkeypatch.setattr(Odd, "target_ratios", {"x": 0.5, "y": 0.25, "off": 0.5})
    cfg = get_cfg()
    cfg.KD.DISTILLERS = ("Odd",)
    model = built(cfg)
    measured = {"odd/x": 0.1, "odd/y": 1.0, "odd/off": 0.0, "odd": 1.5, "detection": 1.0}
    pulls = [pull(name, value) for name, value in measured.items()]
    (item,) = suggest(cfg, model, pulls, 1.0, by_term=True)
    # PART scales x alone; no key scales y alone
    assert [(c.key, c.now, c.suggested) for c in item.changes] == [
        ("KD.ODD.PART", 0.5, pytest.approx(2.5))
    ]
    assert item.targets == {"x": 0.5, "y": 0.25}
    assert item.alone == pytest.approx({"x": 5.0, "y": 0.5})
    assert item.factor == pytest.approx(0.75 / 1.5)
    (item,) = suggest(cfg, model, pulls, 1.0, by_term=True, rounded=power_of_two)
    assert [c.suggested for c in item.changes] == [2.0]
    # without the wish all terms change alike
    (item,) = suggest(cfg, model, pulls, 1.5)
    assert [(c.key, c.suggested) for c in item.changes] == [("KD.ODD.LAMBDA", 2.0)]
    assert item.targets == {}


def test_by_term_is_nothing_where_nothing_is_declared():
    cfg = tiny_cfg("GFL", **{"KD.DISTILLERS": ("PKD",)})
    pulls = [pull("pkd/feat", 0.5), pull("detection", 1.0)]
    model = built(cfg)
    assert suggest(cfg, model, pulls, 2.0, by_term=True) == suggest(cfg, model, pulls, 2.0)


def test_a_term_without_gradient_is_left_out(odd, monkeypatch):
    monkeypatch.setattr(Odd, "target_ratios", {"x": 0.5, "y": 0.25})
    cfg = get_cfg()
    cfg.KD.DISTILLERS = ("Odd",)
    names = {"odd/x": 0.0, "odd/y": 1.0, "odd/off": 0.0, "odd": 1.0, "detection": 1.0}
    pulls = [pull(name, value) for name, value in names.items()]
    (item,) = suggest(cfg, built(cfg), pulls, 1.0, by_term=True, rounded=power_of_two)
    assert item.changes == ()


@pytest.mark.parametrize(
    "value, expected", [(1.0, 1.0), (3.0, 4.0), (2.8, 2.0), (0.3, 0.25), (0.7, 0.5), (100, 128)]
)
def test_nearest_power_of_two(value, expected):
    assert power_of_two(value) == expected
