"""The recipes say what the rows of the paper's tables say."""

from pathlib import Path

import pytest

from kd_d2.distillation import build_distillers, build_tap
from kd_d2.engine.main import build_config
from tests.fixtures import tiny_model

COCO = Path(__file__).parents[3] / "projects/CrossKD/configs/COCO"
BOTH = {"cls": 1.0, "reg": 4.0}
MIMIC = {f"mimic_{k}": v for k, v in BOTH.items()}
R18 = ("R18", "gfl_r50")
R50 = ("R50", "gfl_r101")


def _crosskd(i=3, weights=BOTH, **others):
    branches = [b for b in ("cls", "reg") if b in weights]
    usual = {"modes": ("cross",), "strategy": "a", "cls_loss": "_qfl", "region": "all"}
    return {**usual, "weights": weights, "positions": {b: i for b in branches}, **others}


ONLY = {"cls": {"cls": 1.0}, "reg": {"reg": 4.0}}
ROWS = {
    "gfl_r18_r50_1x": (R18, _crosskd(), None),
    "gfl_r50_r101_1x": (R50, _crosskd(), None),
    "gfl_r34_r101_1x": (("R34", "gfl_r101"), _crosskd(), None),
    "gfl_r18_r101_1x": (("R18", "gfl_r101"), _crosskd(), None),
    **{f"table1_position{i}": (R18, _crosskd(i), None) for i in (0, 1, 2, 4)},
    "table1_mimic": (R18, _crosskd(5), None),
    "table2_pkd_neck": (R18, None, ["neck"]),
    "table2_pkd_cls": (R18, None, ["head.cls[3]"]),
    "table2_pkd_reg": (R18, None, ["head.box[3]"]),
    "table2_pkd_cls_reg": (R18, None, ["head.cls[3]", "head.box[3]"]),
    **{f"table3_cross_{b}": (R18, _crosskd(weights=ONLY[b]), None) for b in ONLY},
    **{f"table3_mimic_{b}": (R18, _crosskd(weights=ONLY[b], modes=("mimic",)), None) for b in ONLY},
    "table4_cross_mimic": (
        R18,
        _crosskd(weights={**BOTH, **MIMIC}, modes=("cross", "mimic")),
        None,
    ),
    "table7_mimic": (R50, _crosskd(modes=("mimic",)), None),
    "table7_pkd": (R50, None, ["neck"]),
    "table7_cross_pkd": (R50, _crosskd(), ["neck"]),
    **{f"table10_strategy_{s}": (R18, _crosskd(strategy=s), None) for s in "bcd"},
    **{
        f"table11_bce_{r}": (R18, _crosskd(cls_loss="_bce", region=r), None)
        for r in ("pos", "neg", "all")
    },
}


def test_every_recipe_is_a_row():
    assert {path.stem for path in COCO.glob("*.yaml")} == set(ROWS)


@pytest.fixture(scope="module")
def keys():
    model = tiny_model("GFL", **{"MODEL.GFL.NUM_CONVS": 4})
    return build_tap(model).keys(model)


@pytest.mark.parametrize("row", ROWS)
def test_row(row, keys):
    (student, teacher), crosskd, pkd = ROWS[row]
    cfg = build_config(str(COCO / f"{row}.yaml"))
    assert f"R{cfg.MODEL.RESNETS.DEPTH}" == student and cfg.MODEL.META_ARCHITECTURE == "GFL"
    assert cfg.SOLVER.MAX_ITER == 90000 and tuple(cfg.SOLVER.STEPS) == (60000, 80000)
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == (800,) and cfg.SOLVER.IMS_PER_BATCH == 16
    assert Path(cfg.KD.TEACHER.CONFIG_FILE).name.startswith(teacher + "_")
    assert Path(cfg.KD.TEACHER.WEIGHTS).name.startswith(teacher + "_")
    distillers = build_distillers(cfg, keys, keys)[0]
    assert set(distillers) == {n for n, x in (("crosskd", crosskd), ("pkd", pkd)) if x is not None}
    if pkd is not None:
        assert distillers["pkd"].pairs == [(key, key) for key in pkd]
        assert distillers["pkd"].weights == {"feat": 6.0}
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


def test_teacher_of_two_schedules():
    """GFL R-101: 2x, short edge uniform in 480..800."""
    cfg = build_config(str(COCO.parents[3] / "configs/teachers/gfl_r101_ms2x.yaml"))
    assert cfg.MODEL.RESNETS.DEPTH == 101 and not cfg.KD.ENABLED
    assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == (480, 800)
    assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and cfg.SOLVER.MAX_ITER == 180000
