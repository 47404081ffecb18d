"""The table and the file of what detectors cost."""

import importlib.util
import json
from pathlib import Path

import pytest
from detectron2.utils.analysis import FlopCountAnalysis

from kd_d2.analysis import random_batch
from tests.engine.support import write_yaml
from tests.fixtures import save_weights, tiny_cfg, tiny_model
from tests.projects.mimicdet.whole import mimicdet_cfg

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--threads", "1", "--rounds", "2", "--warmup", "1", "--no-memory")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("analyze", ROOT / "tools/analyze_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def retinanet(tmp_path):
    return write_yaml(tmp_path / "retina.yaml", tiny_cfg("RetinaNet"))


def test_two_detectors_side_by_side(script, retinanet, tmp_path, capsys):
    weights = save_weights(tiny_model("RetinaNet", seed=1), tmp_path / "lively.pth")
    rcnn = write_yaml(tmp_path / "rcnn.yaml", tiny_cfg("GeneralizedRCNN"))
    output = tmp_path / "cost.json"
    files = ["--config-file", retinanet, "--weights", weights, "--config-file", rcnn]
    script.main(
        [*files, "--weights", "", *QUICK, "--image-size", "96", "120", "--output", str(output)]
    )
    report = json.loads(output.read_text())
    first, second = report["detectors"]
    assert [x["title"] for x in report["detectors"]] == ["retina", "rcnn"]
    assert first["image size"] == [96, 120] and first["padded"] == [96, 128]
    assert first["detections"] > 0 and first["weights"] == weights

    for result, kind in ((first, "RetinaNet"), (second, "GeneralizedRCNN")):
        model = tiny_model(kind).eval()
        assert result["parameters"] == sum(p.numel() for p in model.parameters())
        for key in ("parameters", "flops"):
            assert result[key] == sum(group[key] for group in result["groups"].values())
        assert set(result["latency"]) == {"p50", "p90", "p99", "mean", "min"}
        latency = result["latency"]
        assert 0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"]
        assert 0 < result["groups"]["backbone.bottom_up"]["latency"]["p50"]
    count = FlopCountAnalysis(tiny_model("RetinaNet").eval(), random_batch(1, 96, 120, 1))
    assert first["flops"] == count.unsupported_ops_warnings(False).total()
    assert list(second["groups"]) == [
        "backbone.bottom_up",
        "backbone.fpn",
        "proposal_generator",
        "roi_heads",
        "rest",
    ]
    text = capsys.readouterr().out
    assert "padded to 96x128" in text and "FLOPs are multiply-adds, as fvcore counts" in text
    rows = [line for line in text.splitlines() if line.startswith("| retina ")]
    assert len(rows) == 1 and rows[0].endswith("1.000 |")


def test_parts_for_training_and_teachers_do_not_count(script, tmp_path):
    """MimicDet without its T-head and the finest level; the distilled student without a teacher."""
    path, output = tmp_path / "mimic.yaml", tmp_path / "cost.json"
    path.write_text(mimicdet_cfg().dump())
    options = ["--rounds", "0", "--no-memory", "--image-size", "64", "64", "--output", str(output)]
    script.main(["--config-file", str(path), *options])
    (result,) = json.loads(output.read_text())["detectors"]
    groups = ["backbone.bottom_up", "backbone.fpn", "head", "refinement", "rest"]
    assert list(result["groups"]) == groups  # no t_head
    assert "latency" not in result

    distilled = {"KD.ENABLED": True, "KD.DISTILLERS": ("PKD",), "KD.TEACHER.WEIGHTS": "no.pth"}
    student = write_yaml(tmp_path / "student.yaml", tiny_cfg("RetinaNet"), **distilled)
    script.main(["--config-file", student, *options])
    (result,) = json.loads(output.read_text())["detectors"]
    assert result["parameters"] == sum(p.numel() for p in tiny_model("RetinaNet").parameters())


def test_memory_stands_in_the_table(script, retinanet, monkeypatch, capsys):
    groups = {"backbone.bottom_up": 3 * 2**20, "backbone.fpn": 0, "head": 2**19, "rest": 2**20}
    answer = script.analysis.PeakMemory(4.5 * 2**20, 2**20, groups)
    monkeypatch.setattr(script.analysis, "peak_memory", lambda build, size, threads: answer)
    script.main(["--config-file", retinanet, "--rounds", "0", "--image-size", "64", "64"])
    rows = {x.split("|")[1].strip(): x for x in capsys.readouterr().out.splitlines() if "|" in x}
    assert rows["whole detector"].endswith(" 4.5 |") and rows["head"].endswith(" 0.5 |")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--weights", "a.pth", "--weights", "b.pth"], "1 --config-file need as many --weights"),
        (["--weights", "lost.pth"], "lost.pth does not exist"),
        (["--image-size", "0", "64"], "--image-size must be positive"),
        (["--rounds", "-1"], "must not be negative"),
        (["--output", "nowhere/x.json"], "the folder of --output does not exist: .*nowhere"),
        (["MODEL.RETINANET.NUM_CLASES", "3"], "NUM_CLASES"),
    ],
)
def test_wrong_input_is_one_message(options, message, script, retinanet):
    with pytest.raises(SystemExit, match=message):
        script.main(["--config-file", retinanet, *options])


def test_weights_of_another_network(script, retinanet, tmp_path):
    weights = save_weights(tiny_model("FCOS"), tmp_path / "fcos.pth")
    with pytest.raises(SystemExit, match="fcos.pth does not fit the student of --config-file"):
        script.main(["--config-file", retinanet, "--weights", weights])
