"""The command line of tools/convert_weights.py."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from kd_d2.engine.main import build_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "convert_weights.py"

CONFIG = """
MODEL:
  META_ARCHITECTURE: "RetinaNet"
  DEVICE: "cpu"
  BACKBONE: {NAME: "build_kd_resnet_fpn_backbone"}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, OUT_FEATURES: ["res3", "res4", "res5"]}
  FPN: {IN_FEATURES: ["res3", "res4", "res5"], OUT_CHANNELS: 32}
  RETINANET: {NUM_CLASSES: 3}
VERSION: 2
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    torch.manual_seed(0)
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, folder / "resnet18.pth")
    torch.save({**state, "extra.weight": torch.zeros(1)}, folder / "extra.pth")
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def arguments(files, name="resnet18.pth", source="torchvision", *more):
    output = files / "converted.pth"
    output.unlink(missing_ok=True)
    return output, [
        *("--source", source, "--input", str(files / name), "--output", str(output)),
        *map(str, more),
    ]


def test_last_stage_of_a_c4_head(script, files):
    config = files / "c4.yaml"
    config.write_text(
        'MODEL: {META_ARCHITECTURE: "GeneralizedRCNN", ROI_HEADS: {NAME: "KDRes5ROIHeads"},\n'
        "  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, STRIDE_IN_1X1: False}}\nVERSION: 2\n"
    )
    places = ("--prefix", "backbone.", "--res5", "roi_heads.res5.")
    output, argv = arguments(
        files, "resnet18.pth", "torchvision", *places, "--config-file", config, "--quiet"
    )
    assert script.main(argv) == 0
    source = torch.load(files / "resnet18.pth")
    model = torch.load(output, weights_only=True)["model"]
    last = model["roi_heads.res5.1.conv2.weight"]
    assert torch.equal(last, source["layer4.1.conv2.weight"])
    assert not any(name.startswith("backbone.res5") for name in model)


def test_result_loads_into_detectron2(script, files, capsys):
    output, argv = arguments(
        files, "resnet18.pth", "torchvision", "--config-file", files / "config.yaml"
    )
    assert script.main(argv) == 0
    printed = capsys.readouterr().out
    assert "used     conv1.weight -> backbone.bottom_up.stem.conv1.weight" in printed
    assert "dropped  fc.weight: " in printed
    assert "initial     head.cls_score.weight: stays as initialised" in printed
    checkpoint = torch.load(output, weights_only=True)
    assert checkpoint["matching_heuristics"] is False
    assert "torchvision ResNet" in checkpoint["__author__"]
    model = build_model(build_config(str(files / "config.yaml"), []))
    DetectionCheckpointer(model).load(str(output))
    source = torch.load(files / "resnet18.pth", weights_only=True)
    state = model.state_dict()
    assert torch.equal(
        state["backbone.bottom_up.res5.1.conv2.weight"], source["layer4.1.conv2.weight"]
    )
    assert torch.equal(
        state["backbone.bottom_up.res3.0.shortcut.norm.running_var"],
        source["layer2.0.downsample.1.running_var"],
    )


def test_quiet_and_bare_prefix(script, files, capsys):
    output, argv = arguments(files, "resnet18.pth", "torchvision", "--prefix", "", "--quiet")
    assert script.main(argv) == 0
    assert "used     " not in capsys.readouterr().out
    assert "stem.conv1.weight" in torch.load(output, weights_only=True)["model"]


def test_unknown_keys_stop_unless_allowed(script, files, capsys):
    output, argv = arguments(files, "extra.pth")
    assert script.main(argv) == 1
    captured = capsys.readouterr()
    assert "unused   extra.weight" in captured.out and "1 keys of the source" in captured.err
    assert not output.exists()
    assert script.main([*argv, "--allow-unused"]) == 0
    assert "extra.weight" not in torch.load(output, weights_only=True)["model"]


def test_a_model_that_does_not_fit_stops(script, files, capsys):
    output, argv = arguments(
        files,
        *("resnet18.pth", "torchvision", "--config-file", files / "config.yaml"),
        *("MODEL.RESNETS.DEPTH", "34"),
    )
    assert script.main(argv) == 1
    captured = capsys.readouterr()
    assert "does not fit" in captured.err
    assert "missing     backbone.bottom_up.res3.2.conv1.weight" in captured.out
    assert not output.exists()


@pytest.mark.parametrize("case", ["wrong source", "pickle", "absent", "bad key"])
def test_errors_are_one_sentence(script, files, capsys, case):
    more, name, source = [], "resnet18.pth", "torchvision"
    if case == "wrong source":
        source, expected = "mmdetection", "Not an mmdetection"
    elif case == "pickle":
        torch.save({"model": pathlib.Path("x")}, files / "pickle.pth")
        name, expected = "pickle.pth", "pickle.pth"
    elif case == "absent":
        name, expected = "absent.pth", "absent.pth"
    else:
        more = ["--config-file", files / "config.yaml", "MODEL.NONE", "1"]
        expected = "MODEL.NONE"
    output, argv = arguments(files, name, source, *more)
    assert script.main(argv) == 1
    assert expected in capsys.readouterr().err and not output.exists()


def test_help_runs_as_a_script():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "mmdetection" in done.stdout and "--allow-unused" in done.stdout
