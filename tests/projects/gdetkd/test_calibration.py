"""tools/calibrate_kd.py with GDetKD: distillers first, a target for every term."""

import importlib.util
import itertools
import json
import math

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from kd_d2.distillation import KDModel, LossSchedule, build_distillers, build_tap
from kd_d2.engine.calibration import train_distillers
from tests.engine.support import ROOT
from tests.fixtures import (
    CLASSES,
    registered_toy_dataset,
    save_weights,
    teacher_of,
    tiny_batch,
    tiny_cfg,
    tiny_model,
)

POOLER = {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7}
GDETKD = {"KD.ENABLED": True, "KD.DISTILLERS": ("GDetKD",), "KD.GDETKD.CKD.QUEUE_SIZE": 2048}


def state(module):
    return {name: x.detach().clone() for name, x in module.named_parameters()}


def changed(module, before):
    return {name for name, x in module.named_parameters() if not torch.equal(x, before[name])}


def kd_model(distillers, arch="RetinaNet", **values):
    cfg = tiny_cfg(arch, **{**GDETKD, "KD.DISTILLERS": distillers, "SOLVER.BASE_LR": 0.1, **values})
    student = tiny_model(arch)
    student.backbone.bottom_up.stem.conv1.weight.requires_grad_(False)
    teacher = teacher_of(tiny_model("GeneralizedRCNN", 1, **POOLER))
    built, _ = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    model = KDModel(
        student=student,
        distillers=built,
        teacher=teacher,
        schedules={"gdetkd": LossSchedule(start_iter=100, end_iter=200)},
    )
    return cfg, model.train()


def test_distillers_are_trained_while_the_student_stands_still():
    cfg, model = kd_model(("GDetKD",))
    student, distiller = state(model.student), state(model.distillers)
    learning = {name for name, p in model.student.named_parameters() if p.requires_grad}
    schedules = model.schedules
    seed_all_rng(0)
    train_distillers(cfg, model, itertools.repeat(tiny_batch()), 2)
    assert not changed(model.student, student)
    # also where the schedule would leave the distiller out
    assert {name.split(".")[1] for name in changed(model.distillers, distiller)} == {
        "feature",
        "ckd",
    }
    queue = model.distillers["gdetkd"].ckd["0"].queue
    assert queue.valid.shape[0] > 100
    # everything is as before
    found = {name for name, p in model.student.named_parameters() if p.requires_grad}
    assert found == learning and "backbone.bottom_up.stem.conv1.weight" not in found
    assert model.schedules is schedules
    assert all(p.grad is None for p in model.student.parameters())


def test_the_student_learns_again_after_an_error():
    cfg, model = kd_model(("GDetKD",))

    def broken():
        yield from ()
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        train_distillers(cfg, model, broken(), 2)
    assert model.student.head.cls_score.weight.requires_grad and "gdetkd" in model.schedules


def test_a_distiller_without_parameters_needs_no_optimizer():
    cfg, model = kd_model(
        ("GDetKD",),
        **{
            "KD.GDETKD.FEAT.MODE": "none",
            "KD.GDETKD.CKD.ENABLED": False,
            "KD.GDETKD.HETERO_PRED.CLS": "bce",
        },
    )
    train_distillers(cfg, model, itertools.repeat(tiny_batch()), 1)


@pytest.fixture
def script():
    path = ROOT / "tools" / "calibrate_kd.py"
    spec = importlib.util.spec_from_file_location("calibrate_kd", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_suggested_weights_reach_the_declared_ratios(script, tmp_path, capsys):
    with registered_toy_dataset(tmp_path, 4, size=(64, 64)) as name:
        data = {"DATASETS.TRAIN": (name,), "INPUT.MIN_SIZE_TRAIN": (64,)}
        teacher = tiny_cfg("GeneralizedRCNN", **data, **POOLER)
        (tmp_path / "teacher.yaml").write_text(teacher.dump())
        model = tiny_model("GeneralizedRCNN", 1, **POOLER)
        values = {
            **GDETKD,
            "KD.TEACHER.CONFIG_FILE": "teacher.yaml",
            "KD.TEACHER.WEIGHTS": save_weights(model, tmp_path / "teacher.pth", CLASSES),
            "KD.GDETKD.HETERO_PRED.CLS": "bce",
            "MODEL.WEIGHTS": save_weights(tiny_model("RetinaNet"), tmp_path / "s.pth", CLASSES),
            # the same samples in both calls
            "KD.GDETKD.DENSE.NUM_SAMPLES": 10_000,
            "KD.GDETKD.CKD.QUEUE_SIZE": 40_000,
        }
        config = tmp_path / "student.yaml"
        config.write_text(tiny_cfg("RetinaNet", **data, **values).dump())
        base = ["--config-file", str(config), "--iterations", "1", "--by-term"]

        def run(*arguments):
            script.main([*base, *map(str, arguments)])
            return capsys.readouterr().out

        first = json.loads(run("--json", "--train-distillers", 1))
        (item,) = first["suggestions"]
        assert first["distillers trained"] == 1
        assert item["targets"] == {"feat": 0.5, "ckd": 0.5, "cls": 0.25}
        keys = [f"KD.GDETKD.{group}.WEIGHT" for group in ("FEAT", "CKD", "CLS")]
        assert [change["key"] for change in item["changes"]] == keys
        first = json.loads(run("--json"))
        (item,) = first["suggestions"]
        opts = [part for c in item["changes"] for part in (c["key"], c["suggested"])]
        second = json.loads(run("--json", *opts))
        ratios = {p["name"]: p["ratios"]["pyramid"]["mean"] for p in second["pulls"]}
        for term, wanted in item["targets"].items():
            assert ratios[f"gdetkd/{term}"] == pytest.approx(wanted, rel=1e-2)
        text = run("--power-of-two", "--warmup", 1, "--plain-warmup")
        assert "after 1 of plain training" in text and "wanted feat 0.5, ckd 0.5, cls 0.25" in text
        pasted = text.splitlines()[-1].split()
        assert pasted[::2] == keys
        assert {math.frexp(float(value))[0] for value in pasted[1::2]} == {0.5}
