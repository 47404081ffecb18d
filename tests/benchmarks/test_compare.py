"""The comparison of methods: its statistics, its configs, and a run of two methods."""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import sys
from unittest.mock import ANY

import pytest

from kd_d2.engine import experiment

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATASETS = ("digit_scenes", "bccd")


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("kd_d2_compare", ROOT / "benchmarks/compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(method, seed, ap, seconds=100.0, resumed=False):
    metrics = {"AP": ap, "AP50": 2 * ap, "AP75": ap / 2}
    parts = {"seconds": seconds, "resumed": resumed}
    return {"method": method, "seed": seed, "metrics": metrics, **parts}


RUNS = [
    *(run("plain", seed, ap) for seed, ap in ((1, 10.0), (2, 20.0), (3, 30.0))),
    # differences 3, 1, 8: mean 4, deviations -1, -3, 4, variance (1 + 9 + 16) / 2 = 13
    run("a", 1, 13.0, seconds=300.0),
    run("a", 2, 21.0, seconds=500.0),
    run("a", 3, 38.0, seconds=1.0, resumed=True),
    run("b", 2, 15.0),
]


def test_mean_and_deviation_of_a_sample(compare):
    # (1 + 2 + 4) / 3; squared deviations 16/9 + 1/9 + 25/9 = 14/3, divided by 2
    assert compare.mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3)))
    mean, sd = compare.mean_sd([5.0])
    assert mean == 5.0 and math.isnan(sd)


def test_gains_are_paired_by_seed(compare):
    plain, a, b = compare.summary(RUNS)
    assert [entry["method"] for entry in (plain, a, b)] == ["plain", "a", "b"]
    assert plain["AP"] == pytest.approx((20.0, 10.0)) and plain["AP gain"] is None
    assert a["AP"] == pytest.approx((24.0, math.sqrt((11**2 + 3**2 + 14**2) / 2)))
    assert a["AP gain"] == pytest.approx((4.0, math.sqrt(13)))
    assert a["AP50 gain"] == pytest.approx((8.0, 2 * math.sqrt(13)))
    # by the student of seed 2, not by the mean of all students
    assert b["AP gain"][0] == pytest.approx(-5.0) and math.isnan(b["AP gain"][1])
    assert a["seconds"] == pytest.approx(400.0)


def test_order_of_the_runs_changes_no_number(compare):
    entries = {entry["method"]: entry for entry in compare.summary(RUNS[::-1])}
    for entry in compare.summary(RUNS):
        assert repr(entry) == repr(entries[entry["method"]])


def test_without_the_student_alone_there_is_no_gain(compare):
    (entry,) = compare.summary([run("a", 1, 13.0), run("a", 2, 21.0)])
    assert entry["AP gain"] is None and entry["AP"][0] == pytest.approx(17.0)


def test_table(compare):
    lines = compare.markdown(RUNS).splitlines()
    header, a, b = ([c.strip() for c in lines[i].strip("|").split("|")] for i in (0, 3, 4))
    a, b = dict(zip(header, a)), dict(zip(header, b))
    assert a["AP, seed 1"] == "13.00" and b["AP, seed 1"] == ""
    assert a["AP"] == "24.00 ± 12.77" and a["gain in AP"] == "+4.00 ± 3.61"
    assert b["AP"] == "15.00" and b["gain in AP"] == "-5.00"
    assert a["seconds a run"] == "400"


def test_time_left(compare):
    runs = [run("a", 1, 1.0, seconds=10.0), run("b", 1, 1.0, seconds=30.0)]
    assert compare.time_left(runs, ["a", "b", "b", "c"]) == pytest.approx(10 + 30 + 30 + 20)


def arguments(compare, folder, tmp_path, **changes):
    folder = compare.FOLDER / folder
    values = {"folder": folder, "title": folder.name, "seeds": [1, 2], "opts": []}
    values.update(output=str(tmp_path), teacher=str(tmp_path / "teacher"))
    values.update(methods=compare.methods(folder), **changes)
    return argparse.Namespace(**values)


def parsed(compare, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    return compare.parse_args()


def test_folders_and_what_is_written_where(compare, monkeypatch, tmp_path):
    own = parsed(compare, monkeypatch, "--dataset", "bccd")
    assert own.folder == ROOT / "configs/comparison/bccd"
    assert own.output == "output/comparison/bccd"
    assert own.teacher == "output/comparison/bccd/teacher"
    monkeypatch.chdir(ROOT)
    same = parsed(compare, monkeypatch, "--configs", "configs/comparison/bccd")
    assert vars(same) == {**vars(own), "configs": "configs/comparison/bccd", "dataset": ANY}
    # a folder of a project is told from another project's of the same name
    inside = ROOT / "projects/Some/configs/comparison/bccd"
    assert compare.title(inside) == "projects/Some/bccd"
    with pytest.raises(SystemExit):
        parsed(compare, monkeypatch, "--configs", str(tmp_path))


def test_folder_of_ones_own_without_a_teacher(compare, monkeypatch, tmp_path):
    base = ROOT / "configs/DigitScenes/gfl_r18.yaml"
    for name in ("plain", "other"):
        (tmp_path / f"{name}.yaml").write_text(f'_BASE_: "{base}"\n')
    args = parsed(compare, monkeypatch, "--configs", str(tmp_path), "--seeds", "4")
    assert args.title == tmp_path.name and args.methods == ["plain", "other"]
    teacher, students = compare.configs(args)
    assert teacher is None and [(name, seed) for name, seed, _ in students] == [
        ("plain", 4),
        ("other", 4),
    ]
    assert students[0][2].KD.TEACHER.WEIGHTS == ""


def test_a_teacher_that_other_comparisons_share(compare, monkeypatch, tmp_path):
    args = parsed(compare, monkeypatch, "--dataset", "bccd", "--teacher", str(tmp_path))
    teacher, students = compare.configs(args)
    assert teacher.OUTPUT_DIR == str(tmp_path)
    weights = {cfg.KD.TEACHER.WEIGHTS for _, _, cfg in students}
    assert weights == {str(tmp_path / "model_final.pth")}


@pytest.mark.parametrize("dataset", DATASETS)
def test_students_differ_in_distillation_only(compare, dataset, tmp_path):
    teacher, students = compare.configs(arguments(compare, dataset, tmp_path))
    assert [seed for _, seed, _ in students] == sorted(seed for _, seed, _ in students)
    by_name = {(name, seed): cfg for name, seed, cfg in students}
    assert {"plain", "pkd", "crosskd", "crosskd_pkd"} <= {name for name, _ in by_name}
    assert not by_name["plain", 1].KD.ENABLED
    folders = set()
    for (name, seed), cfg in by_name.items():
        difference = compare.overrides(cfg, by_name["plain", 2])
        assert all(key.startswith("KD.") for key in difference), difference
        assert cfg.SEED == seed and cfg.KD.ENABLED == (name != "plain")
        assert cfg.KD.TEACHER.WEIGHTS == os.path.join(teacher.OUTPUT_DIR, "model_final.pth")
        assert os.path.basename(cfg.KD.TEACHER.CONFIG_FILE) == "teacher.yaml"
        assert cfg.DATASETS == teacher.DATASETS
        folders.add(cfg.OUTPUT_DIR)
    assert len(folders) == len(students) and teacher.OUTPUT_DIR not in folders


@pytest.mark.parametrize("dataset", DATASETS)
def test_both_at_once_are_each_alone(compare, dataset, tmp_path):
    args = arguments(compare, dataset, tmp_path, seeds=[1])
    cfgs = {name: cfg for name, _, cfg in compare.configs(args)[1]}
    assert cfgs["crosskd_pkd"].KD.CROSSKD == cfgs["crosskd"].KD.CROSSKD
    assert cfgs["crosskd_pkd"].KD.PKD == cfgs["pkd"].KD.PKD


def test_unknown_method(compare, tmp_path):
    args = arguments(compare, "bccd", tmp_path)
    args.methods = ["plain", "magic"]
    with pytest.raises(ValueError, match="magic.*plain.*crosskd"):
        compare.configs(args)


def test_missing_initial_weights_are_found_before_training(compare, tmp_path):
    teacher, _ = compare.configs(arguments(compare, "digit_scenes", tmp_path))
    teacher = teacher.clone()
    teacher.defrost()
    compare.check_weights([teacher])  # none
    teacher.MODEL.WEIGHTS = "detectron2://somewhere.pkl"
    compare.check_weights([teacher])
    teacher.MODEL.WEIGHTS = str(tmp_path / "there.pth")
    (tmp_path / "there.pth").touch()
    compare.check_weights([teacher])
    teacher.MODEL.WEIGHTS = str(tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match="gone.pth"):
        compare.check_weights([teacher])


def call(compare, monkeypatch, tmp_path, *options):
    tiny = {
        "SOLVER.MAX_ITER": "2",
        "SOLVER.STEPS": "()",
        "SOLVER.IMS_PER_BATCH": "2",
        "TEST.EVAL_PERIOD": "0",
        "DATASETS.DIGIT_SCENES.NUM_TRAIN": "8",
        "DATASETS.DIGIT_SCENES.NUM_VAL": "2",
        "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "INPUT.MAX_SIZE_TRAIN": "64",
    }
    command = ["compare.py", "--dataset", "digit_scenes", "--output", str(tmp_path / "out")]
    opts = ["--opts", *(word for pair in tiny.items() for word in pair)]
    monkeypatch.setattr(sys, "argv", [*command, "--threads", "1", *options, *opts])
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    compare.main()
    return json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.slow
def test_two_methods_and_two_seeds(compare, monkeypatch, tmp_path, capsys):
    results = call(compare, monkeypatch, tmp_path, "--methods", "plain", "pkd", "--seeds", "1")
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [("plain", 1), ("pkd", 1)]
    assert results["runs"][1]["overrides"] == {"KD.ENABLED": "True", "KD.DISTILLERS": "('PKD',)"}
    assert results["teacher"]["overrides"]["MODEL.RESNETS.DEPTH"] == "34"
    assert str(tmp_path) not in json.dumps(results)

    trained = []
    original = experiment.KDTrainer

    def counting(cfg):
        trained.append(os.path.basename(cfg.OUTPUT_DIR))
        return original(cfg)

    # a second seed later: teacher and finished students are not trained again
    monkeypatch.setattr(experiment, "KDTrainer", counting)
    later = call(compare, monkeypatch, tmp_path, "--methods", "plain", "pkd", "--seeds", "1", "2")
    assert trained == ["plain_seed2", "pkd_seed2"]
    assert later["runs"][:2] == results["runs"] and len(later["runs"]) == 4
    assert "4 of 4 students finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.md").read_text().count("\n| p") == 2
    assert (tmp_path / "out" / "results.png").stat().st_size > 1000
