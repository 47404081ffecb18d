"""What is read from the folder of a run, and what is said when it is none."""

import json

import pytest
import torch

from kd_d2.report import read_runs
from kd_d2.report.run import short_titles


def write_run(folder, config="SEED: 1\n", metrics=()):
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    (folder / "metrics.json").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return folder


def test_real_run(trained):
    plain, pkd = read_runs([str(folder) for folder in trained])
    assert (plain.title, pkd.title) == ("plain", "pkd <i>")
    assert plain.missing == [] and pkd.missing == []
    assert plain.last_iteration == 20 and plain.get("SOLVER.MAX_ITER") == 20
    assert plain.get("KD.ENABLED") is False and pkd.get("KD.DISTILLERS") == ["PKD"]
    assert plain.get("KD.NOTHING.SUCH", "x") == "x"
    assert plain.test_sets == list(plain.cfg.DATASETS.TEST) and len(plain.test_sets) == 1
    assert "loss_kd/pkd/feat" in pkd.series and "loss_kd/pkd/feat" not in plain.series
    assert plain.result["iterations"] == 20
    assert torch.load(plain.checkpoint, weights_only=True)["iteration"] == 19


def test_values_that_are_no_numbers_are_counted(tmp_path):
    metrics = [{"iteration": 19, "a": float("nan"), "b": 1.0}, {"iteration": 39, "a": 2, "b": 1}]
    (run,) = read_runs([str(write_run(tmp_path / "r", metrics=metrics))])
    assert run.series == {"a": [(39, 2.0)], "b": [(19, 1.0), (39, 1.0)]}
    assert run.dropped == {"a": 1}
    assert run.last_iteration is None  # nothing was trained


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        read_runs([str(tmp_path / "nowhere")])


def test_a_folder_without_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="is not the folder of a run.*metrics.json.*results.json$"):
        read_runs([str(tmp_path)])


def test_a_folder_of_runs_names_them(tmp_path):
    write_run(tmp_path / "comparison" / "a_seed1")
    write_run(tmp_path / "comparison" / "b_seed1")
    with pytest.raises(ValueError, match="there are 2 runs below it.*a_seed1, .*b_seed1"):
        read_runs([str(tmp_path / "comparison")])


def test_the_same_folder_twice(tmp_path):
    folder = write_run(tmp_path / "r")
    with pytest.raises(ValueError, match="named twice"):
        read_runs([str(folder), f"{folder}/."])


@pytest.mark.parametrize(
    "change, part, reason",
    [
        (lambda r: (r / "config.yaml").unlink(), "config", "there is no config.yaml"),
        (lambda r: (r / "config.yaml").write_text("a: ["), "config", "config.yaml cannot be read"),
        (
            lambda r: (r / "config.yaml").write_text("a: !!python/object/apply:os.getcwd []"),
            "config",
            "runs Python code",
        ),
        (lambda r: (r / "metrics.json").unlink(), "curves", "there is no metrics.json"),
        (lambda r: (r / "metrics.json").write_text('{"a": 1}\n'), "curves", "cannot be read"),
        (lambda r: (r / "metrics.json").write_text("[1]\n"), "curves", "cannot be read"),
        (lambda r: (r / "result.json").write_text("{"), "result", "result.json cannot be read"),
    ],
)
def test_what_is_missing_is_noted(tmp_path, change, part, reason):
    folder = write_run(tmp_path / "r", metrics=[{"iteration": 0, "loss": 1.0}])
    change(folder)
    (run,) = read_runs([str(folder)])
    (line,) = run.missing
    assert (line.run, line.part) == ("r", part) and reason in line.reason


def test_the_last_checkpoint_stands_in_for_the_final_one(tmp_path):
    folder = write_run(tmp_path / "r")
    (run,) = read_runs([str(folder)])
    assert run.checkpoint is None
    (folder / "last_checkpoint").write_text("model_0000009.pth")
    assert run.checkpoint is None  # it is not there
    (folder / "model_0000009.pth").write_text("")
    assert run.checkpoint == str(folder / "model_0000009.pth")
    (folder / "model_final.pth").write_text("")
    assert run.checkpoint == str(folder / "model_final.pth")


def test_titles_are_as_short_as_they_can_be():
    assert short_titles(["/a/x", "/b/y"]) == ["x", "y"]
    assert short_titles(["/a/x", "/b/x", "/c/ax"]) == ["a/x", "b/x", "ax"]
    assert short_titles(["/x", "/b/x"]) == ["x", "b/x"] or short_titles(["/x", "/b/x"]) == [
        "/x",
        "b/x",
    ]
