"""The benchmark of inference: what it counts, and what it writes."""

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from kd_d2.engine.main import build_config
from tests.fixtures import tiny_batch, tiny_cfg
from tests.projects.mimicdet.whole import mimicdet_cfg, mimicdet_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inference():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("inference")
        for name in ("inference", "step_time"):
            sys.modules.pop(name)


@pytest.fixture
def arguments():
    values = {"batch_size": 1, "image_size": (64, 96), "clock": "wall", "rounds": 2, "warmup": 0}
    return Namespace(**values, threads=1, opts=[])


def test_what_is_measured_is_what_is_deployed(inference):
    cfg = mimicdet_cfg()
    small, model = inference.measured(cfg), inference.trained(cfg)
    assert small.t_head is None and "p2" not in small.backbone.output_shape()
    assert not small.training and model.training
    with torch.no_grad():
        ours, theirs = small(tiny_batch()), model.eval()(tiny_batch())
    for a, b in zip(ours, theirs):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].scores, b["instances"].scores)


def test_random_weights_keep_boxes_for_the_s_head(inference):
    for model in (inference.measured(mimicdet_cfg()), inference.trained(mimicdet_cfg()).eval()):
        with torch.no_grad():
            images = model.preprocess_image(tiny_batch())
            refined = model.refinement(images, model.pyramid(images.tensor, False))
        assert not any(x.any() for x in refined.deltas)
        # some of the best 60 anchors lie in the padding
        assert all(len(x) > 30 for x in refined.proposals)


def test_the_three_detectors(inference):
    cfgs = [build_config(path) for path in inference.CONFIGS]
    assert [c.MODEL.META_ARCHITECTURE for c in cfgs] == ["MimicDet", "RetinaNet", "FCOS"]
    for cfg in cfgs:
        assert cfg.MODEL.RESNETS.DEPTH == 50 and not cfg.MODEL.WEIGHTS
        assert cfg.MODEL.FPN.OUT_CHANNELS == 256
    nodes = (cfgs[0].MODEL.ROI_HEADS, cfgs[1].MODEL.RETINANET, cfgs[2].MODEL.FCOS)
    assert all(node.SCORE_THRESH_TEST == 1.0 for node in nodes)


def test_ratios_are_computed_per_round(inference, arguments, monkeypatch):
    seconds = {"a": [1.0, 2.0, 4.0], "b": [3.0, 4.0, 20.0]}
    monkeypatch.setattr(inference, "interleaved", lambda parts, args: seconds)
    monkeypatch.setattr(inference, "flops", lambda model, inputs: 3e9)
    model = mimicdet_model().eval()
    a, b = inference.compare_detectors({"a": model, "b": model}, tiny_batch(1), arguments)
    assert a["ratio"]["median"] == 1 and b["ratio"]["median"] == 3  # of 3, 2 and 5; not 4 / 2
    assert b["seconds"]["median"] == 4.0 and b["GFLOPs"] == 3.0
    assert b["parameters"] == sum(p.numel() for p in model.parameters())
    row = inference.detector_table([a, b]).splitlines()[3]
    assert "4000.0" in row and "3.000 | 2.000 to 5.000" in row


def test_pairs(inference, arguments):
    pairs = inference.compare_pairs(mimicdet_cfg(), arguments)
    step, pyramid, pointwise = pairs
    assert step["ways"] == ("training step without T-head", "training step with T-head")
    # lateral 64 -> 32, output 32 -> 32 with 3x3, and the coarser map enlarged to 16x24; fvcore
    # counts 4 for every element of the latter only where it interpolates bilinearly
    saved = (pyramid["GFLOPs"][0] - pyramid["GFLOPs"][1]) * 1e9
    assert saved == pytest.approx(16 * 24 * (64 * 32 + 9 * 32 * 32), rel=0.02)
    assert pyramid["difference"] == 0
    # 3 classes and background, two projections 32 -> 48; 8x12 + 4x6 + 2x3 + 1x2 + 1 cells
    weights = 2 * 32 * 48 + 48 * 4 + 48 * 4
    cells = 96 + 24 + 6 + 2 + 1
    assert pointwise["GFLOPs"][0] * 1e9 == pytest.approx(cells * weights)
    assert pointwise["GFLOPs"][1] * 1e9 == pytest.approx(60 * weights)
    assert pointwise["difference"] < 1e-5
    lines = inference.pair_table(pairs).splitlines()
    assert len(lines) == 8 and "1x1 layers on the kept boxes" in lines[-1]


@pytest.mark.slow
def test_the_program(inference, monkeypatch, tmp_path, capsys):
    files = []
    for name, cfg in (("mimic", mimicdet_cfg()), ("retina", tiny_cfg("RetinaNet"))):
        files.append(str(tmp_path / f"{name}.yaml"))
        Path(files[-1]).write_text(cfg.dump())
    options = ["--rounds", "2", "--warmup", "0", "--threads", "1", "--image-size", "64", "96"]
    output = tmp_path / "out.json"
    words = ["inference.py", "--configs", *files, *options, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    inference.main()
    report = json.loads(output.read_text())
    assert [x["detector"] for x in report["detectors"]] == ["mimic", "retina"]
    assert len(report["pairs"]) == 3 and report["environment"]["image size"] == [64, 96]
    assert "training step with T-head" in capsys.readouterr().out
