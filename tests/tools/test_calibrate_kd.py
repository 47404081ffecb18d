"""tools/calibrate_kd.py on the toy data set: what it suggests is right when it is tried."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.engine.support import teacher_keys
from tests.fixtures import registered_toy_dataset, tiny_cfg

TOOL = Path(__file__).resolve().parents[2] / "tools" / "calibrate_kd.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("calibrate_kd", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path):
    """Path of a config of two distillers on toy data, in a folder of its own."""
    with registered_toy_dataset(tmp_path, 4, size=(64, 64)) as name:
        cfg = tiny_cfg(
            "GFL",
            **{
                **teacher_keys(tmp_path, "GFL"),
                "KD.ENABLED": True,
                "KD.DISTILLERS": ("CrossKD", "PKD"),
                "KD.CROSSKD.POSITION": 1,
                "KD.PKD.SCHEDULE.WARMUP_ITERS": 100,
                "DATASETS.TRAIN": (name,),
                "INPUT.MIN_SIZE_TRAIN": (64,),
                "OUTPUT_DIR": str(tmp_path / "output"),
            },
        )
        path = tmp_path / "student.yaml"
        path.write_text(cfg.dump())
        yield path


def run(script, capsys, *arguments):
    script.main([str(a) for a in arguments])
    return capsys.readouterr().out


def test_suggested_weights_reach_the_target(script, config, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    base = ["--config-file", config, "--iterations", 2, "--target-ratio", 0.5]
    first = json.loads(run(script, capsys, *base, "--json"))
    (warning,) = first["warnings"]
    assert "the student's head is at its random initialisation" in warning
    assert first["iterations"] == 2 and not first["trained"]
    names = [pull["name"] for pull in first["pulls"]]
    assert names == [
        *("crosskd/cls", "crosskd/reg", "crosskd", "pkd/feat", "all distillers", "detection")
    ]
    changes = [c for s in first["suggestions"] for c in s["changes"]]
    assert [c["key"] for c in changes] == [
        *("KD.CROSSKD.CLS_WEIGHT", "KD.CROSSKD.REG_WEIGHT", "KD.PKD.WEIGHT")
    ]
    overrides = [part for c in changes for part in (c["key"], c["suggested"])]
    text = run(script, capsys, *base, "--markdown", *overrides)
    row = next(line for line in text.splitlines() if line.startswith("| pkd/feat"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3].startswith("0.5 ±") and float(cells[1]) == pytest.approx(
        changes[-1]["suggested"], rel=1e-2
    )
    assert re.search(r"^\| crosskd +\| +\| +\| 0.5 ±", text, re.M)
    # the last line can be pasted behind a command, and changes nothing any more
    pasted = text.splitlines()[-1].strip("`").split()
    assert pasted[0::2] == overrides[0::2]
    assert [float(x) for x in pasted[1::2]] == pytest.approx(overrides[1::2], rel=1e-2)
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def test_weights_change_in_the_warm_up_and_with_train_only(script, config, capsys, monkeypatch):
    changes, measuring = [], []

    def spy(cfg, model, original=script.training_update):
        update = original(cfg, model)
        weight = model.student.head.cls_score.weight

        def recorded(total):
            before = weight.detach().clone()
            update(total)
            changes.append((bool(measuring), (weight - before).abs().max().item()))

        return recorded

    def measure(*args, original=script.measure, **kwargs):
        measuring.append(True)
        return original(*args, **kwargs)

    monkeypatch.setattr(script, "training_update", spy)
    monkeypatch.setattr(script, "measure", measure)
    arguments = ["--config-file", config, "--iterations", 1]
    opts = ["KD.DISTILLERS", "('PKD',)"]
    text = run(script, capsys, *arguments, "--warmup", 2, *opts)
    assert "1 iterations of 2 images, without changing a weight, after 2 of training" in text
    assert [during for during, _ in changes] == [False, False]
    assert all(change > 0 for _, change in changes)
    assert "random initialisation" not in text
    changes.clear()
    text = run(script, capsys, *arguments, "--train", *opts)
    assert "1 iterations of 2 images, trained on" in text and "random initialisation" in text
    assert [during for during, _ in changes] == [True] and changes[0][1] > 0


def test_a_trained_student_is_not_warned_about(config):
    from kd_d2.engine.calibration import build_run
    from kd_d2.engine.main import build_config

    weights = str(config.parent / "teacher.pth")  # the same architecture
    assert build_run(build_config(str(config))).random_head
    assert not build_run(build_config(str(config), ["MODEL.WEIGHTS", weights])).random_head
    inherited = ["KD.INIT_STUDENT.PREFIXES", "('head.',)"]
    assert not build_run(build_config(str(config), inherited)).random_head


def test_mistakes_are_one_sentence(script, config):
    def message(*arguments):
        with pytest.raises(SystemExit) as error:
            script.main([str(a) for a in arguments])
        return str(error.value)

    file = ["--config-file", config]
    assert "KD.ENABLED is False" in message(*file, "KD.ENABLED", "False")
    assert "--target-ratio must be positive" in message(*file, "--target-ratio", "-1")
