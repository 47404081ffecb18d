"""Parts of the demo; continuous integration runs it as a whole."""

import argparse
import importlib.util
import os
import pathlib

import pytest

TOOL = pathlib.Path(__file__).resolve().parents[2] / "tools" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("kd_d2_demo", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_students_share_everything_but_distillation(demo, tmp_path):
    args = argparse.Namespace(output_dir=str(tmp_path), seed=3, quick=False)
    teacher, plain, crosskd = (demo.config_of(run, args) for run in demo.RUNS)
    assert not plain.KD.ENABLED and crosskd.KD.ENABLED
    for node in ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER", "SEED"):
        assert plain[node] == crosskd[node], node
    assert os.path.dirname(crosskd.KD.TEACHER.WEIGHTS) == teacher.OUTPUT_DIR
    assert teacher.MODEL.RESNETS.DEPTH > plain.MODEL.RESNETS.DEPTH


def test_table(demo):
    result = {
        "metrics": {"AP": 1.234, "AP50": 5.0, "AP75": 0.5}, "parameters": 11_610_000,
        "iterations": 600, "seconds": 9.6, "resumed": False,
    }  # fmt: skip
    results = {run.name: dict(result) for run in demo.RUNS}
    results["crosskd"]["resumed"] = True
    lines = demo.table(results).splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == [demo.RUNS[1].title, "1.23", "5.00", "0.50", "11.61", "600", "10"]
    assert "10 (since resumed)" in lines[4]
