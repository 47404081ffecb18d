"""Runs that are done once: what counts as the same run, and what is kept of it."""

import json
import os

import pytest

from kd_d2.engine import experiment
from kd_d2.engine.experiment import ProgressBar, finished_result, settings, train_once
from kd_d2.engine.trainer import KDTrainer
from tests.engine.support import StopAt, Stopped
from tests.fixtures import registered_toy_dataset, tiny_cfg


def make_cfg(folder, name="", **changes):
    return tiny_cfg(
        "GFL",
        **{
            "DATASETS.TRAIN": (name,) if name else (),
            "DATASETS.TEST": (name,) if name else (),
            "SOLVER.MAX_ITER": 4,
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "OUTPUT_DIR": str(folder),
            **changes,
        },
    )


def store(cfg, **content):
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    with open(os.path.join(cfg.OUTPUT_DIR, "result.json"), "w") as f:
        json.dump({"settings": settings(cfg), **content}, f)


def test_a_result_belongs_to_its_settings(tmp_path):
    cfg = make_cfg(tmp_path)
    assert finished_result(cfg) is None
    store(cfg, found=True)
    assert finished_result(cfg)["found"]
    assert finished_result(make_cfg(tmp_path, **{"SOLVER.BASE_LR": 0.002})) is None


def test_folders_say_nothing_about_a_run(tmp_path):
    cfg = make_cfg(tmp_path / "before")
    store(cfg)
    os.rename(tmp_path / "before", tmp_path / "after")
    changes = {"KD.TEACHER.WEIGHTS": "a.pth", "KD.TEACHER.CONFIG_FILE": "b.yaml"}
    assert finished_result(make_cfg(tmp_path / "after", **changes)) is not None


def test_the_weights_of_the_teacher_count(tmp_path):
    weights = tmp_path / "teacher.pth"
    weights.write_bytes(b"one")
    plain = make_cfg(tmp_path, **{"KD.TEACHER.WEIGHTS": str(weights)})
    taught = make_cfg(tmp_path, **{"KD.ENABLED": True, "KD.TEACHER.WEIGHTS": str(weights)})
    assert "teacher" not in settings(plain)
    store(taught)
    assert finished_result(taught) is not None
    weights.write_bytes(b"two")
    assert finished_result(taught) is None


def test_initial_weights_count_not_their_place(tmp_path):
    for name, content in (("a.pth", b"one"), ("b.pth", b"one"), ("c.pth", b"two")):
        (tmp_path / name).write_bytes(content)
    a, b, c, gone = (
        settings(make_cfg(tmp_path, **{"MODEL.WEIGHTS": str(tmp_path / name)}))
        for name in ("a.pth", "b.pth", "c.pth", "gone.pth")
    )
    assert a == b and a != c and "gone.pth" in gone["MODEL.WEIGHTS"]


def test_results_outlive_new_keys(tmp_path):
    """A key that is added to the library later is what it was if it has its default."""
    cfg = make_cfg(tmp_path)
    store(cfg)
    path = tmp_path / "result.json"
    old = json.loads(path.read_text())
    del old["settings"]["KD.PKD.WEIGHT"]
    path.write_text(json.dumps(old))
    assert finished_result(cfg) is not None
    assert finished_result(make_cfg(tmp_path, **{"KD.PKD.WEIGHT": 5.0})) is None
    old["settings"]["KD.GONE"] = "1"
    path.write_text(json.dumps(old))
    assert finished_result(cfg) is None


@pytest.fixture
def dataset(tmp_path):
    with registered_toy_dataset(tmp_path, 4) as name:
        yield name


def test_a_finished_run_is_not_repeated(tmp_path, dataset, monkeypatch):
    cfg = make_cfg(tmp_path / "run", dataset)
    result = train_once(cfg, "toy")
    assert result["iterations"] == 4 and not result["resumed"]
    assert {"AP", "AP50", "AP75"} <= set(result["metrics"])
    assert result["versions"]["torch"] and result["versions"]["kd_d2"]
    monkeypatch.setattr(experiment, "KDTrainer", None)  # whoever trains now, fails
    again = train_once(cfg, "toy")
    assert repr(again) == repr(result)  # nan is not equal to itself


def test_an_interrupted_run_is_continued(tmp_path, dataset, monkeypatch):
    cfg = make_cfg(tmp_path / "run", dataset)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(experiment, "ProgressBar", lambda title: StopAt(3))
        train_once(cfg, "toy")
    assert finished_result(cfg) is None
    iterations = []
    monkeypatch.setattr(ProgressBar, "before_train", lambda self: None)
    monkeypatch.setattr(ProgressBar, "after_step", lambda s: iterations.append(s.trainer.iter))
    monkeypatch.setattr(ProgressBar, "after_train", lambda self: None)
    assert train_once(cfg, "toy")["resumed"]
    assert iterations == [2, 3]


def test_only_the_very_same_run_is_continued(tmp_path, dataset, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(experiment, "ProgressBar", lambda title: StopAt(3))
        train_once(make_cfg(tmp_path / "run", dataset), "toy")
    assert (tmp_path / "run" / "model_0000001.pth").is_file()
    resumed = []
    original = KDTrainer.resume_or_load

    def spy(self, resume=True):
        resumed.append((resume, sorted(p.name for p in (tmp_path / "run").glob("*.pth"))))
        return original(self, resume)

    monkeypatch.setattr(KDTrainer, "resume_or_load", spy)
    train_once(make_cfg(tmp_path / "run", dataset, **{"SEED": 8}), "toy")
    assert resumed == [(False, [])]
