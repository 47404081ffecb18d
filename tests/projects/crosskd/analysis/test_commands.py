"""Every command of projects/CrossKD/tools on a tiny pair and data set."""

import csv
import re

import numpy as np
import pytest
from PIL import Image

from kd_d2.engine.analysis_command import titled_path
from tests.engine.support import ROOT, importable_tools
from tests.fixtures import CLASSES, registered_toy_dataset, save_weights, tiny_cfg, tiny_model

TOOLS = ROOT / "projects" / "CrossKD" / "tools"


@pytest.fixture
def command():
    with importable_tools(TOOLS) as import_tool:
        yield import_tool


@pytest.fixture
def files(tmp_path):
    """Paths of a config with a teacher and of a student's checkpoint, for one architecture."""

    def write(arch):
        data = {"DATASETS.TRAIN": (name,), "DATASETS.TEST": (name,)}
        distilled = {
            "KD.ENABLED": True,
            "KD.DISTILLERS": ("CrossKD",),
            "KD.CROSSKD.POSITION": 1,
            "KD.TEACHER.CONFIG_FILE": "teacher.yaml",
            "KD.TEACHER.WEIGHTS": str(tmp_path / "teacher.pth"),
        }
        (tmp_path / "teacher.yaml").write_text(tiny_cfg(arch, **data).dump())
        config = tmp_path / "student.yaml"
        config.write_text(tiny_cfg(arch, **data, **distilled).dump())
        save_weights(tiny_model(arch, 1), tmp_path / "teacher.pth", CLASSES)
        student = tiny_model(arch, 0)
        paths = [
            save_weights(student, tmp_path / "run" / f"model_{i:07d}.pth", CLASSES) for i in (4, 9)
        ]
        return ["--config-file", str(config), "--output", str(tmp_path / "out")], paths

    with registered_toy_dataset(tmp_path, 3) as name:
        yield write


def rows(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


def is_picture(path):
    return len(Image.open(path).convert("L").getcolors(maxcolors=256)) > 10


@pytest.mark.parametrize("arch", ["GFL", "RetinaNet", "FCOS", "ATSS"])
def test_gradient_maps(command, files, tmp_path, arch):
    arguments, paths = files(arch)
    command("gradient_maps").main([*arguments, "--weights", paths[0], "--images", "0,2"])
    out = tmp_path / "out"
    assert is_picture(out / "gradients_00002.png") and (out / "index.html").is_file()
    stored = np.load(out / "gradients_00002.npz")
    names = {
        f"{m}.{t}.p{i}" for m in ("crosskd", "pkd") for t in ("cls", "reg") for i in range(3, 8)
    }
    assert set(stored.files) == names | {"boxes"}
    assert stored["crosskd.cls.p3"].shape == (16, 16) and stored["boxes"].shape == (2, 4)
    table = rows(out / "shares.csv")
    assert len(table) == 2 * 2 * 2 * 6
    for row in table:
        if row["level"] == "p3":
            assert 0 < float(row["share_inside"]) < 1
    assert "| crosskd | cls   | all" in (out / "table.md").read_text()


def test_l1_curves(command, files, tmp_path):
    arguments, _ = files("GFL")
    run = ["--run", f"baseline={tmp_path / 'run'}"]
    tool, out = command("l1_curves"), tmp_path / "out"
    tool.main([*arguments, *run, "--num-images", "2"])
    table = rows(out / "curves.csv")
    assert [row["iteration"] for row in table] == ["5", "10"]
    # the two checkpoints are equal
    for name in ("cls_teacher", "cls_gt", "reg_teacher", "reg_gt"):
        assert float(table[0][name]) == float(table[1][name]) > 0
    assert "AP" in table[0] and is_picture(out / "curves.png")
    # nothing is measured again
    tool.measure = None
    tool.main([*arguments, *run, "--num-images", "2", "--resume"])
    assert rows(out / "curves.csv") == table
    with pytest.raises(TypeError):
        tool.main([*arguments, *run, "--num-images", "3", "--resume"])


def test_l1_curves_without_ap(command, files, tmp_path):
    arguments, _ = files("FCOS")
    command("l1_curves").main(
        [*arguments, "--run", f"a={tmp_path / 'run'}", "--images", "1", "--no-ap"]
    )
    assert "AP" not in rows(tmp_path / "out" / "curves.csv")[0]


def test_compare_detections(command, files, tmp_path):
    arguments, paths = files("RetinaNet")
    models = ["--model", f"student={paths[0]}", "--model", f"CrossKD={paths[1]}"]
    command("compare_detections").main([*arguments, *models, "--images", "1"])
    out = tmp_path / "out"
    picture = Image.open(out / "detections.png")
    assert picture.width > 3 * picture.height and is_picture(out / "detections.png")
    table = rows(out / "detections.csv")
    assert [r["network"] for r in table][-2:] == ["ground truth"] * 2
    assert {r["index"] for r in table} == {"1"}
    found = [r for r in table if r["network"] == "student"]
    assert found == [{**r, "network": "student"} for r in table if r["network"] == "CrossKD"]


@pytest.mark.parametrize("arch", ["GFL", "RetinaNet", "FCOS", "ATSS"])
def test_conflict_maps(command, files, tmp_path, arch):
    arguments, paths = files(arch)
    options = ["--num-images", "2", "--pictures", "1", "--levels", "p3,p4", "--class", "disc"]
    options += ["--threshold", "0.02"]
    command("conflict_maps").main([*arguments, "--weights", paths[0], *options])
    out = tmp_path / "out"
    table = rows(out / "fractions.csv")
    assert [row["level"] for row in table] == ["p3", "p4", "p5", "p6", "p7"] * 2
    first = table[0]["index"]
    assert [path.name for path in out.glob("*.png")] == [f"conflicts_{int(first):05d}.png"]
    stored = np.load(out / f"conflicts_{int(first):05d}.npz")
    anchors = 4 if arch == "RetinaNet" else 1
    assert stored["ground_truth.p3"].shape == (anchors, len(CLASSES), 16, 16)
    assert table[0]["conflicts"] == str(stored["conflict.p3"].sum()) != "0"
    finest = [row for row in table if row["level"] == "p3"]
    fraction = sum(int(r["conflicts"]) for r in finest) / sum(int(r["positions"]) for r in finest)
    lines = (out / "table.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| p3")]
    assert line.split("|")[3].strip() == f"{fraction:.4f}"


ERRORS = [
    ("gradient_maps", ["--weights", "WEIGHTS", "--position", "9"], "got 9"),
    ("gradient_maps", ["--weights", "nowhere.pth"], "nowhere.pth"),
    ("gradient_maps", ["--weights", "WEIGHTS", "--images", "7"], "0..2.*got '7'"),
    ("gradient_maps", ["--weights", "WEIGHTS", "--levels", "p9"], "names 'p9'.*p3"),
    ("conflict_maps", ["--weights", "WEIGHTS", "--class", "duck"], "'duck'.*disc"),
    ("conflict_maps", ["--weights", "WEIGHTS", "--threshold", "2"], r"\[0, 1\), got 2"),
    ("conflict_maps", ["--weights", "WEIGHTS", "KD.TEACHER.CONFIG_FILE", ""], "no teacher"),
    ("conflict_maps", ["--weights", "WEIGHTS", "MODEL.GFL.CONV_DIM", "32"], "does not fit"),
    ("l1_curves", ["--run", "a=nowhere"], "nowhere"),
    ("l1_curves", ["--run", "a=b", "--images", "1"], "--no-ap"),
    ("compare_detections", ["--model", "a=nowhere.pth"], "nowhere.pth"),
    ("compare_detections", ["--dataset", "unknown", "--model", "a=b"], "unknown"),
]


@pytest.mark.parametrize("name, options, message", ERRORS)
def test_mistakes_are_one_sentence(command, files, name, options, message):
    arguments, paths = files("GFL")
    options = [paths[0] if option == "WEIGHTS" else option for option in options]
    with pytest.raises(SystemExit) as stopped:
        command(name).main([*arguments, *options])
    assert re.search(message, str(stopped.value)), stopped.value


def test_titles_and_paths():
    assert titled_path("a=b=c") == ("a", "b=c")
    with pytest.raises(Exception, match="TITLE=PATH"):
        titled_path("nothing")
