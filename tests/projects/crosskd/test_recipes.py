"""The recipes say what the rows of the paper's tables say."""

import functools
from pathlib import Path

import pytest

from kd_d2.distillation import DetectorTeacher, build_distillers, build_tap
from kd_d2.engine.main import build_config
from tests.fixtures import tiny_model

ROOT = Path(__file__).parents[3]
COCO = ROOT / "projects/CrossKD/configs/COCO"
TEACHERS = ROOT / "configs/teachers"
BOTH = {"cls": 1.0, "reg": 4.0}
MIMIC = {f"mimic_{k}": v for k, v in BOTH.items()}
GFL_R18 = ("GFL", "R18", "gfl_r50_1x")
GFL_R50 = ("GFL", "R50", "gfl_r101_ms2x")
RETINA_R18 = ("RetinaNet", "R18", "retinanet_r50_1x")
RETINA_R50 = ("RetinaNet", "R50", "retinanet_r101_2x")
RETINA_SWIN = ("RetinaNet", "R50", "retinanet_swin_t_1x")
RETINA_MOBILE = ("RetinaNet", "MobileNetV2", "retinanet_r50_1x")
FCOS = ("FCOS", "R50", "fcos_r101_caffe_ms2x")
ATSS = ("ATSS", "R50", "atss_r101_1x")


def _crosskd(i=3, weights=BOTH, **others):
    branches = [b for b in ("cls", "reg") if b in weights]
    usual = {"modes": ("cross",), "strategy": "a", "cls_loss": "_qfl", "region": "all"}
    return {**usual, "weights": weights, "positions": {b: i for b in branches}, **others}


ONES = {"cls": 1.0, "reg": 1.0}
FCOS_WEIGHTS = {"cls": 0.4, "reg": 0.75}
ONLY = {"cls": {"cls": 1.0}, "reg": {"reg": 4.0}}
NECK = (["neck"], 6.0)
# row: (networks, CrossKD, (locations, weight) of PKD, schedule)
ROWS = {
    "gfl_r18_r50_1x": (GFL_R18, _crosskd(), None),
    "gfl_r50_r101_1x": (GFL_R50, _crosskd(), None),
    "gfl_r34_r101_1x": (("GFL", "R34", GFL_R50[2]), _crosskd(), None),
    "gfl_r18_r101_1x": (("GFL", "R18", GFL_R50[2]), _crosskd(), None),
    **{f"table1_position{i}": (GFL_R18, _crosskd(i), None) for i in (0, 1, 2, 4)},
    "table1_mimic": (GFL_R18, _crosskd(5), None),
    "table2_pkd_neck": (GFL_R18, None, NECK),
    "table2_pkd_cls": (GFL_R18, None, (["head.cls[3]"], 6.0)),
    "table2_pkd_reg": (GFL_R18, None, (["head.box[3]"], 6.0)),
    "table2_pkd_cls_reg": (GFL_R18, None, (["head.cls[3]", "head.box[3]"], 6.0)),
    **{f"table3_cross_{b}": (GFL_R18, _crosskd(weights=ONLY[b]), None) for b in ONLY},
    **{
        f"table3_mimic_{b}": (GFL_R18, _crosskd(weights=ONLY[b], modes=("mimic",)), None)
        for b in ONLY
    },
    "table4_cross_mimic": (
        GFL_R18,
        _crosskd(weights={**BOTH, **MIMIC}, modes=("cross", "mimic")),
        None,
    ),
    "table5_teacher_3x": (("RetinaNet", "R18", "retinanet_r50_ms3x"), _crosskd(weights=ONES), None),
    "table7_mimic": (GFL_R50, _crosskd(modes=("mimic",)), None),
    "table7_pkd": (GFL_R50, None, NECK),
    "table7_cross_pkd": (GFL_R50, _crosskd(), NECK),
    "retinanet_r18_r50_1x": (RETINA_R18, _crosskd(weights=ONES), None),
    "retinanet_r50_r101_2x": (RETINA_R50, _crosskd(weights=ONES), None, "2x"),
    "table8_retinanet_cross_pkd": (RETINA_R50, _crosskd(weights=ONES), (["neck"], 2.0), "2x"),
    "fcos_r50_r101_2x": (FCOS, _crosskd(2, FCOS_WEIGHTS), None, "2x"),
    "table8_fcos_cross_pkd": (FCOS, _crosskd(2, FCOS_WEIGHTS), (["neck"], 2.0), "2x"),
    "atss_r50_r101_1x": (ATSS, _crosskd(weights={**ONES, "ctr": 1.0}), None),
    "table8_atss_cross_pkd": (ATSS, _crosskd(weights={**ONES, "ctr": 1.0}), (["neck"], 1.0)),
    "retinanet_r50_swin_t_1x": (RETINA_SWIN, _crosskd(weights=ONES), None),
    "table9_swin_t_pkd": (RETINA_SWIN, None, (["neck"], 2.0)),
    "retinanet_mobilenet_v2_r50_1x": (RETINA_MOBILE, _crosskd(weights=ONES), None),
    "table9_mobilenet_v2_pkd": (RETINA_MOBILE, None, (["neck"], 2.0)),
    **{f"table10_strategy_{s}": (GFL_R18, _crosskd(strategy=s), None) for s in "bcd"},
    **{
        f"table11_bce_{r}": (GFL_R18, _crosskd(cls_loss="_bce", region=r), None)
        for r in ("pos", "neg", "all")
    },
}
FITNETS = ("RetinaNet", "R18", "retinanet_r50_ms3x")
LD = {"main": 0.25, "vlr": 0.25, "cls": 10.0}
# row: (networks, the only distiller, its weights): the methods that CrossKD is compared with
BASELINES = {
    "table1_ld": (GFL_R18, "ld", LD),
    "table5_fitnets": (FITNETS, "fitnets", {"feat": 1.0}),
    "table7_fitnets": (GFL_R50, "fitnets", {"feat": 2.0}),
    "table7_inside_gt": (GFL_R50, "insidegt", {"feat": 2.0}),
    "table7_defeat": (GFL_R50, "defeat", {"fg": 3.0, "bg": 12.0}),
    "table7_main_region": (GFL_R50, "mainregion", {"feat": 2.0}),
    "table7_fine_grained": (GFL_R50, "finegrained", {"feat": 2.0}),
    "table7_fgd": (
        GFL_R50,
        "fgd",
        {"fg": 1e-3, "bg": 5e-4, "attention": 5e-4, "relation": 5e-6},
    ),
    "table7_gid": (GFL_R50, "gid", {"feat": 0.005, "rel": 40.0, "cls": 0.1, "box": 0.1}),
    "table7_gi_imitation": (GFL_R50, "ld", {"gi": 2.0}),
    "table7_skd": (GFL_R50, "skd", {"feat": 4.0}),
    "table7_ld": (GFL_R50, "ld", LD),
}
ALL_ROWS = [*ROWS, *BASELINES]
SCHEDULES = {"1x": (90000, (60000, 80000)), "2x": (180000, (120000, 160000))}


def test_every_recipe_is_a_row():
    assert {path.stem for path in COCO.glob("*.yaml")} == set(ALL_ROWS)


@functools.lru_cache(maxsize=None)
def _keys(arch):
    model = tiny_model(arch, **{f"MODEL.{arch.upper()}.NUM_CONVS": 4})
    return build_tap(model).keys(model)


def _backbone(cfg):
    names = {"build_mobilenetv2_fpn_backbone": "MobileNetV2", "build_swin_fpn_backbone": "Swin-T"}
    return names.get(cfg.MODEL.BACKBONE.NAME, f"R{cfg.MODEL.RESNETS.DEPTH}")


def _check_networks(cfg, networks, schedule="1x"):
    arch, student, teacher = networks
    assert _backbone(cfg) == student and cfg.MODEL.META_ARCHITECTURE == arch
    iterations, steps = SCHEDULES[schedule]
    assert cfg.SOLVER.MAX_ITER == iterations and tuple(cfg.SOLVER.STEPS) == steps
    assert cfg.SOLVER.IMS_PER_BATCH == 16
    assert Path(cfg.KD.TEACHER.CONFIG_FILE).stem == teacher
    assert Path(cfg.KD.TEACHER.WEIGHTS).stem == "_fpn_".join(teacher.rsplit("_", 1))


@pytest.mark.parametrize("row", ROWS)
def test_row(row):
    networks, crosskd, pkd, *schedule = ROWS[row]
    cfg = build_config(str(COCO / f"{row}.yaml"))
    _check_networks(cfg, networks, *schedule)
    sizes = (640, 800) if networks[0] == "FCOS" else (800,)
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == sizes
    keys = _keys(networks[0])
    distillers = build_distillers(cfg, keys, keys)[0]
    assert set(distillers) == {n for n, x in (("crosskd", crosskd), ("pkd", pkd)) if x is not None}
    if pkd is not None:
        locations, weight = pkd
        assert distillers["pkd"].pairs == [(key, key) for key in locations]
        assert distillers["pkd"].weights == {"feat": weight}
    if crosskd is not None:
        distiller, node = distillers["crosskd"], cfg.KD.CROSSKD
        actual = {
            "positions": distiller.positions,
            "modes": distiller.modes,
            "weights": distiller.weights,
            "strategy": node.STRATEGY,
            "cls_loss": distiller.cls_loss.__name__,
            "region": node.CLS_REGION,
        }
        assert actual == crosskd


@pytest.mark.parametrize("row", BASELINES)
def test_row_of_another_method(row):
    networks, label, weights = BASELINES[row]
    cfg = build_config(str(COCO / f"{row}.yaml"))
    _check_networks(cfg, networks)
    keys = _keys(networks[0])
    distillers = build_distillers(cfg, keys, keys)[0]
    assert list(distillers) == [label]
    assert distillers[label].weights == pytest.approx(weights)


def test_recipes_with_more_than_a_distiller():
    """HEAD's (Table 5) and FGD's: gradients of the model clipped, layers of the teacher copied."""
    fitnets, fgd = (
        build_config(str(COCO / f"{row}.yaml")) for row in ("table5_fitnets", "table7_fgd")
    )
    for cfg, value in ((fitnets, 20.0), (fgd, 35.0)):
        clip = cfg.SOLVER.CLIP_GRADIENTS
        assert clip.ENABLED and clip.FULL_MODEL and clip.CLIP_TYPE == "norm"
        assert clip.CLIP_VALUE == value and cfg.SOLVER.BASE_LR == 0.01
    assert tuple(fitnets.INPUT.MIN_SIZE_TRAIN) == (640, 800)
    assert fitnets.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    assert fitnets.KD.INIT_STUDENT.PREFIXES == ("head.",)
    model = tiny_model("GFL")
    copied = {n for n, _ in model.named_parameters() if n.startswith(fgd.KD.INIT_STUDENT.PREFIXES)}
    rest = {n for n, _ in model.named_parameters()} - copied
    assert rest and all(name.startswith("backbone.bottom_up.") for name in rest)


@pytest.mark.parametrize("row", ALL_ROWS)
def test_sixth_level(row):
    """RetinaNet: CrossKD's students from P5, teachers and HEAD's student from C5 (crosskd.md 2.1);
    all others from P5."""
    cfg = build_config(str(COCO / f"{row}.yaml"))
    teacher = DetectorTeacher.load_config(cfg)
    is_retina = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert cfg.MODEL.FPN.P6_SOURCE == ("c5" if row == "table5_fitnets" else "p5")
    assert teacher.MODEL.FPN.P6_SOURCE == ("c5" if is_retina else "p5")
    for side in (cfg, teacher):
        assert side.MODEL.FPN.P7_RELU == (cfg.MODEL.META_ARCHITECTURE == "FCOS")


def _teacher(name):
    cfg = build_config(str(TEACHERS / f"{name}.yaml"))
    assert not cfg.KD.ENABLED
    return cfg


@pytest.mark.parametrize(
    "name, arch, backbone, iterations, sizes, sampling",
    [
        ("gfl_r50_1x", "GFL", "R50", 90000, (800,), "choice"),
        ("gfl_r101_ms2x", "GFL", "R101", 180000, (480, 800), "range"),
        ("retinanet_r50_1x", "RetinaNet", "R50", 90000, (800,), "choice"),
        ("retinanet_r50_ms3x", "RetinaNet", "R50", 270000, (640, 800), "range"),
        ("retinanet_r101_2x", "RetinaNet", "R101", 180000, (800,), "choice"),
        ("retinanet_swin_t_1x", "RetinaNet", "Swin-T", 90000, (800,), "choice"),
        ("fcos_r101_caffe_ms2x", "FCOS", "R101", 180000, (640, 800), "choice"),
        ("atss_r101_1x", "ATSS", "R101", 90000, (800,), "choice"),
    ],
)
def test_teacher(name, arch, backbone, iterations, sizes, sampling):
    cfg = _teacher(name)
    assert (cfg.MODEL.META_ARCHITECTURE, _backbone(cfg)) == (arch, backbone)
    assert cfg.SOLVER.MAX_ITER == iterations
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == sizes
    assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == sampling


def test_swin_t():
    """Plain SGD at 0.01, drop path 0.2 (crosskd.md 2.1)."""
    cfg = _teacher("retinanet_swin_t_1x")
    node = cfg.MODEL.SWIN
    assert (node.EMBED_DIM, tuple(node.DEPTHS), tuple(node.NUM_HEADS)) == (
        96,
        (2, 2, 6, 2),
        (3, 6, 12, 24),
    )
    assert node.DROP_PATH_RATE == 0.2 and node.WINDOW_SIZE == 7 and cfg.SOLVER.BASE_LR == 0.01


@pytest.mark.parametrize(
    "path", [COCO / "fcos_r50_r101_2x.yaml", TEACHERS / "fcos_r101_caffe_ms2x.yaml"]
)
def test_schedule_of_fcos(path):
    """Everything that crosskd.md section 4 says about FCOS."""
    cfg = build_config(str(path))
    solver = cfg.SOLVER
    assert (solver.WARMUP_METHOD, solver.WARMUP_ITERS) == ("constant", 500)
    assert solver.WARMUP_FACTOR == pytest.approx(1 / 3)
    assert (solver.BIAS_LR_FACTOR, solver.WEIGHT_DECAY_BIAS) == (2.0, 0.0)
    clip = solver.CLIP_GRADIENTS
    assert clip.ENABLED and clip.FULL_MODEL
    assert (clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE) == ("norm", 35.0, 2.0)
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == (640, 800)
    assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "choice" and cfg.INPUT.FORMAT == "BGR"
    assert list(cfg.MODEL.PIXEL_MEAN) == [102.9801, 115.9465, 122.7717]
    assert list(cfg.MODEL.PIXEL_STD) == [1.0, 1.0, 1.0]
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 and "MSRA/R-" in cfg.MODEL.WEIGHTS
    assert cfg.MODEL.FCOS.PRESET == "paper" and cfg.MODEL.RESNETS.NORM == "FrozenBN"


def test_readme_says_how_to_get_every_weight():
    """Each file below weights/ that a recipe names is the output of one command, and that of a
    teacher is checked against the config that uses it."""
    text = (COCO.parents[1] / "README.md").read_text()
    commands = [line for line in text.splitlines() if "convert_weights.py" in line]
    teachers = {networks[2] for networks, *_ in [*ROWS.values(), *BASELINES.values()]}
    for path in [*COCO.glob("*.yaml"), *(TEACHERS / f"{name}.yaml" for name in teachers)]:
        cfg = build_config(str(path))
        for weights in (cfg.MODEL.WEIGHTS, cfg.KD.TEACHER.WEIGHTS):
            if weights.startswith("weights/"):
                (command,) = [line for line in commands if f"--output {weights}" in line.strip()]
                if weights == cfg.KD.TEACHER.WEIGHTS:
                    name = Path(cfg.KD.TEACHER.CONFIG_FILE).name
                    assert command.endswith(f"--config-file configs/teachers/{name}"), path
