"""The doctor accepts what trains and refuses, with one message, what the trainer would."""

import logging
import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.events import EventStorage

from kd_d2.analysis import random_batch
from kd_d2.doctor.__main__ import main
from kd_d2.engine import KDTrainer
from kd_d2.engine.main import build_config
from tests.engine.support import data_module, isolated_registries, teacher_keys, write_yaml
from tests.fixtures import CLASSES, registered_toy_dataset, save_weights, tiny_cfg, tiny_model


@pytest.fixture(autouse=True)
def nothing_left_registered():
    with isolated_registries():
        yield


@pytest.fixture
def toy(tmp_path):
    with registered_toy_dataset(tmp_path, 2, size=(64, 64)) as name:
        yield name


def student_yaml(folder, toy, teacher_classes=CLASSES, **changes):
    """A CrossKD student with initial weights and a teacher; return the path of its config."""
    teacher = teacher_keys(folder, "RetinaNet", classes=teacher_classes)
    weights = save_weights(tiny_model("RetinaNet", seed=5), folder / "student.pth")
    data_module(folder / "data.py", toy)
    cfg = tiny_cfg(
        "RetinaNet",
        **{
            "DATASETS.TRAIN": (toy,),
            "DATASETS.TEST": (toy,),
            "MODEL.WEIGHTS": weights,
            "SOLVER.MAX_ITER": 20,
            "OUTPUT_DIR": str(folder / "output"),
        },
    )
    keys = {
        "KD.ENABLED": True,
        "KD.DISTILLERS": ("CrossKD", "PKD"),
        "KD.CROSSKD.POSITION": 1,
        "KD.PKD.SCHEDULE.START_ITER": 7,
        "KD.IMPORTS": ("data.py",),
        **teacher,
    }
    return write_yaml(folder / "student.yaml", cfg, **{**keys, **changes})


def run(config, *options, capsys):
    """Exit status, the report of the check, and what stands on stderr."""
    status = main(["--config-file", config, *options])
    captured = capsys.readouterr()
    report = captured.out[captured.out.index("\ncheck of") :]
    return status, report, captured.err


def test_a_good_config(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = student_yaml(tmp_path, toy)
    before = sorted(path.name for path in tmp_path.iterdir())
    handlers = logging.getLogger("kd_d2").handlers[:]
    status, report, errors = run(config, capsys=capsys)
    assert (status, errors) == (0, "") and "warning" not in report
    assert report.endswith(f"OK: {config} would train here\n")
    assert re.findall(r"^  (\w+)", report, re.M) == ["ok"] * 5
    assert f"classes: {', '.join(CLASSES)}" in report and "3 classes: disc" in report
    assert "distiller pkd: feat x 6, from step 7" in report
    state = tiny_model("RetinaNet").state_dict()
    assert f"student.pth fills {len(state)} of {len(state)} tensors" in report
    # neither the output folder nor anything else is made; loggers are as before
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert logging.getLogger("kd_d2").handlers == handlers

    # the losses are those of the trainer's model with the initial weights, PKD included
    cfg = build_config(config)
    model = KDTrainer.build_model(cfg).train()
    DetectionCheckpointer(model.student).load(cfg.MODEL.WEIGHTS)
    with EventStorage(7):
        losses = model(random_batch(2, 256, 256, len(CLASSES)))
    assert all(value > 0 for value in losses.values()) and len(losses) == 5
    for name, value in losses.items():
        assert f"{name} {value.item():.4g}" in report


def _spoil(path, change):
    data = torch.load(path, weights_only=True)
    change(data["model"])
    torch.save(data, path)


def _nan(state):
    state["backbone.fpn_output3.bias"].fill_(float("nan"))


def _no_scores(state):
    state["head.cls_score.bias"].fill_(-1e4)  # CrossKD's regression is weighted by the scores


@pytest.mark.parametrize(
    "changes, check, message",
    [
        ({"KD.TEACHER.WEIGHTS": "lost.pth"}, 2, "lost.pth does not exist: check KD.TEACHER.WEI"),
        ({"KD.TEACHER.CONFIG_FILE": "lost.yaml"}, 2, "lost.yaml.*does not exist"),
        ({"MODEL.WEIGHTS": "lost.pth"}, 3, "lost.pth does not exist: check MODEL.WEIGHTS"),
        ({"KD.DISTILLERS": ("CrosKD",)}, 2, "KD.DISTILLERS names 'CrosKD'"),
        ({"KD.CROSSKD.POSITION": 9}, 2, "KD.CROSSKD.POSITION"),  # validate
        ({"MODEL.RETINANET.NUM_CLASSES": 4}, 2, "4.*classes|classes.*4"),
        ({"MODEL.META_ARCHITECTURE": "RetinaNetz"}, 2, "No object named 'RetinaNetz'"),
        ({"KD.ENABLD": True}, 0, "KD.ENABLD"),
    ],
)
def test_one_message_where_training_would_end(changes, check, message, toy, tmp_path, capsys):
    status, report, errors = run(student_yaml(tmp_path, toy, **changes), capsys=capsys)
    assert status == 1 and errors.startswith("doctor: error: ") and errors.count("error:") == 1
    assert re.search(message, errors), errors
    assert re.findall(r"^  (\w+)", report, re.M) == ["ok"] * check + ["FAILED"]


def test_teacher_with_other_classes(toy, tmp_path, capsys):
    config = student_yaml(tmp_path, toy, teacher_classes=("disc", "cross", "square"))
    status, _, errors = run(config, capsys=capsys)
    assert status == 1
    assert "class lists differ" in errors and "1: student 'square', teacher 'cross'" in errors
    # the same as a warning
    allowed = ("--skip-step", "KD.TEACHER.ALLOW_CLASS_MISMATCH", "True")
    status, report, errors = run(config, *allowed, capsys=capsys)
    assert (status, errors) == (0, "")
    assert re.search(r"  warning  student, teacher.*warning: class lists differ", report, re.S)
    assert "skipped  a training step" in report
    assert report.endswith(
        "would train here, as far as was looked (not: a training step on noise)\n"
    )


def test_teacher_whose_keys_do_not_fit(toy, tmp_path, capsys):
    config = student_yaml(tmp_path, toy)
    _spoil(tmp_path / "teacher.pth", lambda state: state.pop("head.cls_score.bias"))
    status, _, errors = run(config, capsys=capsys)
    assert status == 1
    assert "1 keys of the model are not in the checkpoint:\n  head.cls_score: bias" in errors


def test_a_loss_that_is_not_finite(toy, tmp_path, capsys):
    config = student_yaml(tmp_path, toy)
    _spoil(tmp_path / "teacher.pth", _nan)
    status, report, errors = run(config, capsys=capsys)
    assert status == 1 and "loss_kd/pkd/feat is not finite" in errors
    assert "FAILED   a training step on noise" in report


def test_a_term_that_teaches_nothing_is_a_warning(toy, tmp_path, capsys):
    config = student_yaml(tmp_path, toy)
    _spoil(tmp_path / "teacher.pth", _no_scores)
    status, report, errors = run(config, capsys=capsys)
    assert (status, errors) == (0, "")
    assert re.search("  warning  a training step.*exactly 0.*loss_kd/crosskd/reg\n", report, re.S)


def test_missing_data_do_not_hide_the_rest(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    config = student_yaml(tmp_path, toy, **{"DATASETS.TRAIN": ("bccd_trainval",)})
    status, report, errors = run(config, capsys=capsys)
    assert status == 1
    assert re.search("bccd_trainval was looked for in .*nowhere.*to get it, take", errors)
    # the networks were looked at nevertheless, and fail too: BCCD has other classes
    assert re.findall(r"^  (\w+)", report, re.M) == ["ok", "FAILED", "FAILED"]
    assert "class lists differ" in report and "class lists differ" not in errors
    status, report, errors = run(config, "--skip-data", "KD.ENABLED", "False", capsys=capsys)
    assert (status, errors) == (0, "") and "skipped  data sets" in report
    assert "KD.ENABLED is False" in report and "loss_kd" not in report


def test_without_a_config_nothing_is_built(capsys):
    assert main([]) == 0
    captured = capsys.readouterr()
    assert "check of" not in captured.out and captured.err == ""
    assert "methods (" in captured.out and "CrossKD" in captured.out
