"""The score H: values of the formula, and the published students against their bases."""

import math

import pytest

from kd_d2.projects.jointdetnas import StudentScore, resolve
from kd_d2.projects.jointdetnas.score import score
from tests.fixtures import tiny_cfg


@pytest.mark.parametrize(
    "cost, resolution, alpha, expected",
    [
        (0.5, 0.5, 0.4, 65.8873),
        (0.5, 1, 0.4, 52.7803),
        (1, 0.5, 0.4, 49.9332),
        (1, 1, 0.4, 40),
        (0.5, 0.5, 0.1, 45.3154),
        (0.2, 0.3, 0, 40),
    ],
)
def test_formula(cost, resolution, alpha, expected):
    found = score(40, cost, resolution, alpha=alpha)
    assert found == pytest.approx(expected, abs=5e-5)
    # the scale of AP changes nothing else
    assert score(0.4, cost, resolution, alpha=alpha) == pytest.approx(found / 100)


@pytest.mark.parametrize(
    "name, base_ap, ap, expected",
    [("r18", 36.0, 38.5, 44.973), ("r50", 39.5, 42.3, 51.582), ("r101", 41.4, 43.9, 65.313)],
)
def test_published_students_are_better_than_their_bases(name, base_ap, ap, expected):
    measure = StudentScore(
        base=resolve(name), base_size=(1333, 800), alpha=0.4, beta=0.8, cost="backbone"
    )
    assert measure(resolve(name), (1333, 800), base_ap) == pytest.approx(base_ap)
    found = measure(resolve(f"searched_{name}"), (1080, 720), ap)
    # computed from multiply-adds rounded to 0.01 G
    assert found == pytest.approx(expected, abs=3e-3) and found > base_ap


def test_resolution_ratios_of_the_paper():
    """With alpha and beta 1 and the base itself, H is AP over the ratio of pixels."""
    measure = StudentScore(
        base=resolve("r18"), base_size=(1333, 800), alpha=1, beta=1, cost="backbone"
    )
    sizes = [(512, 512), (800, 600), (1080, 720), (1333, 800)]
    ratios = [1 / measure(resolve("r18"), size, 1.0) for size in sizes]
    assert ratios == pytest.approx([0.24582, 0.45011, 0.72918, 1], abs=5e-6)


def test_best_resolution():
    base = resolve("r18")
    measure = StudentScore(base=base, base_size=(1333, 800), alpha=0.4, beta=0.8, cost="backbone")
    aps = {(512, 512): 20.0, (800, 600): 31.0, (1080, 720): 35.0, (1333, 800): 36.0}
    best = measure.best(base, aps)
    assert best.size == (800, 600) and best.score == pytest.approx(31 * 0.45011**-0.32, rel=1e-4)
    # a tie: the first one
    ties = measure.best(base, {(10, 20): 0.0, (20, 10): 0.0})
    assert ties == (0.0, (10, 20))


def test_from_config():
    cfg = tiny_cfg("GeneralizedRCNN")
    arch, size = resolve("searched_r50"), (1080, 720)
    measure = StudentScore(cfg, resolve("r50"))
    assert measure(arch, size, 42.3) == pytest.approx(51.582, abs=3e-3)
    cfg.SEARCH.SCORE.COST = "detector"
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_HEADS.NUM_CLASSES = 256, 80
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 7, 1024
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 1000
    whole = StudentScore(cfg, resolve("r50"))
    ratio = 193.950787222 / 215.052399872  # GMAC of both detectors at 1333x800
    assert whole(arch, size, 42.3) == pytest.approx(42.3 * (ratio * 0.72918**0.8) ** -0.4, rel=1e-5)
    # the detector is that of the config
    for key, value in (
        *(("FPN.OUT_CHANNELS", 128), ("ROI_HEADS.NUM_CLASSES", 2000)),
        *(("ROI_BOX_HEAD.FC_DIM", 256), ("ROI_BOX_HEAD.NUM_FC", 1)),
        *(("ROI_BOX_HEAD.POOLER_RESOLUTION", 14), ("RPN.POST_NMS_TOPK_TEST", 10)),
    ):
        other = cfg.clone()
        other.merge_from_list([f"MODEL.{key}", value])
        assert StudentScore(other, resolve("r50")).cost(arch) != whole.cost(arch), key
    cfg.SEARCH.SCORE.ALPHA, cfg.SEARCH.SCORE.BETA = 0.1, 0.5
    cfg.SEARCH.SCORE.BASE_SIZE = (1080, 720)
    other = StudentScore(cfg, resolve("r50"))
    assert other(resolve("r50"), (540, 360), 10) == pytest.approx(10 * 4**0.05)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("COST", "latency", "SEARCH.SCORE.COST must be one of .*'backbone', 'detector'.*latency"),
        ("ALPHA", -0.1, "must not be negative, got -0.1"),
        ("BETA", -1.0, "must not be negative"),
        ("BASE_SIZE", (1333,), "BASE_SIZE must be"),
        ("BASE_SIZE", (1333, 0), "BASE_SIZE must be"),
    ],
)
def test_wrong_keys(key, value, message):
    cfg = tiny_cfg("GeneralizedRCNN")
    cfg.SEARCH.SCORE[key] = value
    with pytest.raises(ValueError, match=message):
        StudentScore(cfg, resolve("r18"))


def test_wrong_values():
    with pytest.raises(ValueError, match="finite, got nan"):
        score(math.nan, 1, 1)
    with pytest.raises(ValueError, match="positive, got 0 and 1"):
        score(40, 0, 1)
