"""Every pair and every value that cannot work is refused before the first step, by name."""

import pytest

from kd_d2.distillation import build_distillers, build_tap
from tests.fixtures import teacher_of, tiny_model
from tests.projects.crosskd.cases import DETECTORS, crosskd_cfg, pair


def _build(name, student=None, teacher=None, **options):
    student = student or pair(name)[0]
    teacher = teacher or pair(name)[1]
    cfg = crosskd_cfg(name, **options)
    return build_distillers(cfg, build_tap(student).keys(student), teacher.keys)[0]["crosskd"]


def _teacher(name, **overrides):
    arch, own = DETECTORS[name]
    return teacher_of(tiny_model(arch, 1, **{**own, **overrides}))


@pytest.mark.parametrize(
    "name, overrides, parts",
    [
        (
            "GFL",
            {"MODEL.GFL.NUM_CONVS": 3},
            ("tower stages of branch 'cls' (NUM_CONVS) is 2 in the student and 3 in the teacher",),
        ),
        ("RetinaNet", {"MODEL.RETINANET.NUM_CONVS": 1}, ("(NUM_CONVS) is 2", "and 1 in")),
        ("GFL", {"MODEL.GFL.CONV_DIM": 32}, ("'head.cls[1]' (CONV_DIM", "is 64 in", "and 32 in")),
        ("GFL", {"MODEL.GFL.NUM_CLASSES": 4}, ("classes (NUM_CLASSES) is 3 in", "and 4 in")),
        ("RetinaNet", {"MODEL.RETINANET.NUM_CLASSES": 4}, ("(NUM_CLASSES) is 3 in", "and 4 in")),
        ("GFL", {"MODEL.GFL.REG_MAX": 8}, ("REG_MAX", "('reg_max', 16)) in", "('reg_max', 8)) in")),
        (
            "ATSS",
            {"MODEL.ATSS.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0)},
            ("BBOX_REG_WEIGHTS", "(10.0, 10.0, 5.0, 5.0)", "(1.0, 1.0, 1.0, 1.0)"),
        ),
        (
            "GFL",
            {"MODEL.GFL.ANCHOR_SCALE": 4.0},
            ("anchors", "ANCHOR_SCALE", "(-32.0, -32.0, 32.0, 32.0) in", "(-16.0, -16.0, 16.0"),
        ),
        (
            "RetinaNet",
            {
                "MODEL.ANCHOR_GENERATOR.SIZES": [
                    [16, 25],
                    [32, 48],
                    [64, 96],
                    [128, 192],
                    [256, 384],
                ]
            },
            ("anchors", "MODEL.ANCHOR_GENERATOR", "(-16.9706, -8.4853", "(-17.6777, -8.8388"),
        ),
        (
            "RetinaNet",
            {"MODEL.ANCHOR_GENERATOR.OFFSET": 0.5},
            ("anchors", "MODEL.ANCHOR_GENERATOR", "('offset', 0.0) in", "('offset', 0.5) in"),
        ),
        (
            "GFL",
            {"MODEL.GFL.IN_FEATURES": ["p3", "p4"]},
            ("strides", "(IN_FEATURES)", "(8, 16, 32, 64, 128) in", "(8, 16) in"),
        ),
        ("FCOS", {"MODEL.FCOS.CENTERNESS_ON": "reg"}, ("MODEL.FCOS.CENTERNESS_ON", "cls", "box")),
        ("FCOS", {"MODEL.FCOS.CENTERNESS_ON": "none"}, ("CENTERNESS_ON", "is cls in", "none in")),
        (
            "FCOS",
            {"MODEL.FCOS.NORM_BY_STRIDE": True},
            ("NORM_BY_STRIDE", "('norm_by_stride', False)", "('norm_by_stride', True)"),
        ),
    ],
)
def test_networks_that_differ(name, overrides, parts):
    """One message with the key, both values and what to do."""
    with pytest.raises(ValueError) as error:
        _build(name, teacher=_teacher(name, **overrides))
    message = str(error.value)
    for part in parts:
        assert part in message
    mend = "Train both on the same classes" if "classes" in message else "Give the student"
    assert mend in message and "\n" not in message and len(message) < 400


def test_pyramid_of_another_width():
    teacher = _teacher("GFL", **{"MODEL.FPN.OUT_CHANNELS": 64})
    with pytest.raises(
        ValueError,
        match=r"'head.box\[0\]' .*MODEL.FPN.OUT_CHANNELS.* is 32 in the student and 64 in the.*"
        "adapters",
    ):
        _build("GFL", teacher=teacher, POSITION=0, BRANCHES=("reg",))
    _build("GFL", teacher=teacher, POSITION=1)  # behind the towers' first stage they are equal


def test_detectors_of_different_kinds():
    with pytest.raises(
        ValueError, match="META_ARCHITECTURE.*DistributionBox2BoxTransform.*_DeltaTransform"
    ):
        _build("GFL", teacher=pair("ATSS")[1])


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("GFL", {}, 'META_ARCHITECTURE "GFL", keeps no moving.*use "official" or "region"'),
        ("ATSS", {}, 'META_ARCHITECTURE "ATSS", keeps no'),
        ("FCOS", {}, 'META_ARCHITECTURE "FCOS", keeps no.*MODEL.FCOS.NORMALIZER "ema"'),
        ("FCOS-d2", {"MODEL.FCOS.NORMALIZER": "count"}, 'META_ARCHITECTURE "FCOS", keeps no'),
    ],
)
def test_moving_average_that_does_not_exist(name, options, message):
    with pytest.raises(
        ValueError, match='KD.CROSSKD.NORMALIZER is "ema", but the student, MODEL.' + message
    ):
        _build(name, NORMALIZER="ema", **options)


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS-d2"])
def test_moving_average_that_exists(name):
    preset = _build(name, NORMALIZER="ema").preset
    assert {preset.cls_normaliser, preset.reg_normaliser, preset.ctr_normaliser} == {"ema"}


def test_box_loss_of_fcos_is_its_own():
    """The d2 preset is trained with GIoU, hence distilled with it; a key that is set wins."""
    assert _build("FCOS").preset.reg_loss == "iou_log"
    assert _build("FCOS-d2").preset.reg_loss == "giou"
    assert _build("FCOS", **{"MODEL.FCOS.BOX_LOSS": "giou"}).preset.reg_loss == "giou"
    assert _build("FCOS-d2", REG_LOSS="iou_log").preset.reg_loss == "iou_log"


def test_two_stage_teacher():
    with pytest.raises(ValueError, match="needs a dense detector with towers"):
        _build("GFL", teacher=teacher_of(tiny_model("GeneralizedRCNN", 1)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"POSITION": 4}, r"POSITION of branch 'cls' must lie in 0\.\.3 \(2 tower stages.*got 4"),
        ({"POSITION_REG": 9}, r"POSITION of branch 'reg' must lie in 0\.\.3.*got 9"),
        ({"POSITION": -2}, r"CROSSKD.POSITION must be -1 \(not set\) or at least 0, got -2"),
        ({"POSITION_CLS": -3}, r"CROSSKD.POSITION_CLS must be -1.*got -3"),
        ({"CLS_WEIGHT": -0.5}, r"CROSSKD.CLS_WEIGHT must be -1.*got -0.5"),
        ({"REG_WEIGHT": float("nan")}, r"CROSSKD.REG_WEIGHT must be -1.*got nan"),
        ({"POSITION": -1}, r"preset's 3 needs towers.* 'cls' has 2 \(NUM_CONVS\)"),
        ({"PRESET": "offical"}, r"PRESET must be one of \['official', 'paper'\], got 'offical'"),
        ({"STRATEGY": "e"}, r"STRATEGY must be one of \['a', 'b', 'c', 'd'\], got 'e'"),
        ({"MODES": ("cross", "mimick")}, r"MODES must be one of .*'mimic'\], got 'mimick'"),
        ({"MODES": ()}, "MODES and KD.CROSSKD.BRANCHES must not be empty"),
        ({"MODES": ("cross", "cross")}, "MODES lists a mode twice"),
        ({"BRANCHES": ()}, "MODES and KD.CROSSKD.BRANCHES must not be empty"),
        ({"BRANCHES": ("box",)}, r"BRANCHES must be one of \['cls', 'reg'\], got 'box'"),
        ({"TAP": "post"}, r"TAP must be one of \['post_act', 'pre_act'\], got 'post'"),
        ({"ALIGN": "yes"}, r"ALIGN must be one of \['none', 'official'\], got 'yes'"),
        ({"CLS_LOSS": "kl"}, r"CLS_LOSS must be one of \['bce', 'qfl'\], got 'kl'"),
        ({"CLS_REGION": "fg"}, r"CLS_REGION must be one of \['all', 'neg', 'pos'\], got 'fg'"),
        ({"CLS_GAMMA": 0.5}, "CLS_GAMMA must be 0 or at least 1, got 0.5"),
        ({"REG_TAU": 0.0}, "REG_TAU must be positive, got 0.0"),
        ({"REG_LOSS": "l1"}, r"REG_LOSS must be one of \['giou', 'iou_log', 'kl'\], got 'l1'"),
        ({"REG_REGION": "all"}, r"REG_REGION must be one of \['fg', 'teacher'\], got 'all'"),
        ({"NORMALIZER": "mean"}, r"NORMALIZER must be one of .*'region'\], got 'mean'"),
        ({"CTR_WEIGHT": 1.0}, "CTR_WEIGHT is 1.0, but the student predicts no centerness"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        _build("GFL", **options)


@pytest.mark.parametrize("name", ["RetinaNet", "ATSS", "FCOS"])
def test_distributions_that_do_not_exist(name):
    """With one bin the divergence would be 0 for good."""
    with pytest.raises(ValueError, match='REG_LOSS "kl" .*predicts 4 numbers per box'):
        _build(name, REG_LOSS="kl")


def test_unknown_detector():
    cfg = crosskd_cfg("GFL", **{"MODEL.META_ARCHITECTURE": "GFLv2"})
    student, teacher = pair("GFL")
    with pytest.raises(
        ValueError, match="no preset for MODEL.META_ARCHITECTURE 'GFLv2'; known: ATSS"
    ):
        build_distillers(cfg, build_tap(student).keys(student), teacher.keys)


def test_presets_are_the_official_values():
    """Weights, positions and losses of the authors' configurations, crosskd.md 2.1."""
    wanted = {
        "GFL": (3, {"cls": 1.0, "reg": 4.0}, "kl"),
        "RetinaNet": (3, {"cls": 1.0, "reg": 1.0}, "giou"),
        "ATSS": (3, {"cls": 1.0, "reg": 1.0, "ctr": 1.0}, "giou"),
        "FCOS": (2, {"cls": 0.4, "reg": 0.75}, "iou_log"),
    }
    for name, (position, weights, reg_loss) in wanted.items():
        key = f"MODEL.{name.upper()}.NUM_CONVS"
        student, teacher = (tiny_model(name, seed, **{key: 4}) for seed in (0, 1))
        distiller = _build(name, student, teacher_of(teacher), POSITION=-1)
        assert distiller.positions == {"cls": position, "reg": position}
        assert distiller.weights == weights
        assert distiller.preset.reg_loss == reg_loss
        assert (distiller.cls_gamma, distiller.reg_tau) == (1.0, 1.0)
        assert distiller.preset.reg_region == "teacher" and not distiller.before_activation
        assert distiller.aligned and distiller.modes == ("cross",) and distiller.detach_target
