"""The command that compares the errors of several runs."""

import copy
import csv
import importlib.util
import json
import pathlib

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from kd_d2.evaluation.tide import ERROR_TYPES
from tests.evaluation.test_tide import toy
from tests.fixtures import CLASSES, registered_toy_dataset

TOOL = pathlib.Path(__file__).resolve().parents[2] / "tools" / "tide.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("kd_d2_tide", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def nothing_left_registered(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


@pytest.fixture
def files(tmp_path):
    """gt.json, the toy's predictions as plain.json, and better.json without its wrong class."""
    gt, predictions = toy()
    better = copy.deepcopy(predictions)
    better[2]["category_id"] = 1
    for name, content in (("gt", gt), ("plain", predictions), ("better", better)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def arguments(files, *more, runs=("plain", "better")):
    result = ["--output", str(files / "out")]
    for run in runs:
        result += ["--run", f"{run}={files / run}.json"]
    return [*result, *more]


def rows(files):
    with open(files / "out" / "tide.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_two_runs(tool, files, capsys, monkeypatch):
    drawn = {}
    draw = tool.draw_panels

    def watched(panels, xs, *rest):
        drawn.update(panels=panels, xs=xs)
        draw(panels, xs, *rest)

    monkeypatch.setattr(tool, "draw_panels", watched)
    tool.main(arguments(files, "--gt", str(files / "gt.json")))
    table = rows(files)
    assert [(row["run"], row["threshold"]) for row in table[::10]] == [
        ("plain", "0.5"),
        ("better", "0.5"),
    ]
    assert len(table) == 20
    assert float(table[0]["AP"]) == pytest.approx(33.66, abs=5e-3)
    assert float(table[0]["Cls"]) == pytest.approx(16.34, abs=5e-3)
    assert float(table[9]["Loc"]) == pytest.approx(27.72, abs=5e-3)
    assert table[9]["number of Loc"] == "2" and table[0]["number of Loc"] == "1"
    assert [float(row["Cls"]) for row in table[10:]] == [0] * 10
    content = json.loads((files / "out" / "tide.json").read_text())
    assert list(content) == ["plain", "better"]
    assert content["plain"]["errors"]["Cls"] == [float(row["Cls"]) for row in table[:10]]
    # six panels, each with a curve per run of that panel's error
    assert [title for title, _ in drawn["panels"]] == list(tool.TITLES.values())
    assert tuple(tool.TITLES) == ERROR_TYPES
    for name, (_, curves) in zip(ERROR_TYPES, drawn["panels"]):
        assert {run: list(values) for run, values in curves.items()} == {
            run: content[run]["errors"][name] for run in ("plain", "better")
        }
    assert drawn["xs"] == tuple(content["plain"]["thresholds"])
    with Image.open(files / "out" / "tide.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height > 400
    captured = capsys.readouterr()
    line = next(line for line in captured.out.splitlines() if line.startswith("| plain"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["plain", "23.56", "16.34", "20.99", "0.00", "0.00", "0.00", "11.78"]
    assert "plain: 100%" in captured.err and "better: 100%" in captured.err  # the bars


def test_registered_data_set(tool, files):
    with registered_toy_dataset(files, 3) as name:
        gt = json.loads(open(MetadataCatalog.get(name).json_file).read())
        found = [{**a, "score": 0.9} for a in gt["annotations"]]
        (files / "perfect.json").write_text(json.dumps(found))
        tool.main(arguments(files, "--dataset", name, "--thresholds", "0.5", runs=["perfect"]))
        assert [float(row["AP"]) for row in rows(files)] == [pytest.approx(100)]
        # one without a JSON file is converted, with the classes' own numbers
        records = DatasetCatalog.get(name)
        DatasetCatalog.register("toy_of_dicts", lambda: records)
        MetadataCatalog.get("toy_of_dicts").set(thing_classes=list(CLASSES))
        found = [{**x, "category_id": x["category_id"] - 1} for x in found]
        (files / "perfect.json").write_text(json.dumps(found))
        tool.main(arguments(files, "--dataset", "toy_of_dicts", runs=["perfect"]))
        assert [float(row["AP"]) for row in rows(files)] == [pytest.approx(100)] * 10


def write(name, content):
    def change(files):
        text = content if isinstance(content, str) else json.dumps(content)
        (files / f"{name}.json").write_text(text)

    return change


_OTHER = {"image_id": 3000, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5}
WRONG = {
    "empty": (write("plain", []), (), "--run plain with .*gt.json: there are no predictions"),
    "image": (
        write("plain", [_OTHER]), (), "image_id: 3000 not among the 6 images .*same data set",
    ),
    "category": (
        write("better", [{**_OTHER, "image_id": 1, "category_id": 5}]), (),
        "--run better .*category_id: 5 not among the 2 categories",
    ),
    "cut off": (write("plain", '[{"image_id": 1,'), (), "plain.json .* not a complete JSON file"),
    "swapped": (write("plain", {"images": []}), (), "plain.json is not predictions .*no list"),
    "no ground truth": (write("gt", []), (), "gt.json is not ground truth .*no dict"),
    "no categories": (write("gt", {"images": []}), (), "no list 'categories'"),
    "thresholds": (None, ("--thresholds", "0.7", "0.5"), "--thresholds must be ascending"),
    "title": (None, ("--run", "plain=x.json"), "its own title"),
    "no file": (None, ("--run", "x=nowhere.json"), r"nowhere.json \(predictions\) does not exist"),
    "config": (None, ("--opts", "SEED", "1"), "--opts belong to --dataset"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_message(tool, files, name):
    change, more, message = WRONG[name]
    if change:
        change(files)
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        tool.main(arguments(files, "--gt", str(files / "gt.json"), *more))
    assert not (files / "out" / "tide.csv").exists()


def test_unknown_data_set(tool, files):
    with pytest.raises(SystemExit, match="--dataset nothing_like_it is not registered; known: "):
        tool.main(arguments(files, "--dataset", "nothing_like_it"))


def test_run_without_title(tool, files, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--gt", "x", "--output", "y", "--run", "z.json"])
    assert "expected TITLE=JSON, got 'z.json'" in capsys.readouterr().err
