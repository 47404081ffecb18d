"""The benchmark of G-DetKD's memory: what it counts, and what it prints."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks/gdetkd_memory.py"


@pytest.fixture
def memory():
    spec = importlib.util.spec_from_file_location("kd_d2_gdetkd_memory", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_storage_counts_once(memory, monkeypatch):
    x = torch.ones(2**18, requires_grad=True)  # 1 MiB

    def loss():
        y = x.exp()  # keeps its result
        # the same storage, seen through a view, and its square's factor once more
        return (y.view(512, 512) * y.view(512, 512)).sum()

    monkeypatch.setitem(memory.TERMS, "known", lambda rois, chunk: loss)
    assert memory.measure(("known", 1, 0))["kept_mib"] == pytest.approx(1.0)


@pytest.mark.parametrize("term", ["SGFI", "CKD", "CKD, fp16 queue"])
def test_chunks_keep_less(memory, monkeypatch, term):
    for name, value in (("CHANNELS", 16), ("WIDTH", 32), ("QUEUE", 2048)):
        monkeypatch.setattr(memory, name, value)
    whole, chunked = (memory.measure((term, 32, chunk)) for chunk in (0, 8))
    assert whole["kept_mib"] > chunked["kept_mib"] > 0
    # mostly the similarities of all RoIs with the queue, 32 x 2048 numbers
    if term == "CKD":
        assert whole["kept_mib"] - chunked["kept_mib"] == pytest.approx(0.25, rel=0.1)


def test_command(memory, monkeypatch, tmp_path, capsys):
    options = ["--rois", "8", "--chunks", "0", "4", "--terms", "SGFI"]
    monkeypatch.setattr(sys, "argv", ["m.py", *options, "--output", str(tmp_path / "m.json")])
    monkeypatch.setattr(memory.multiprocessing, "get_context", lambda _: InProcess)
    memory.main()
    results = json.loads((tmp_path / "m.json").read_text())
    assert [(r["term"], r["rois"], r["chunk"]) for r in results] == [("SGFI", 8, 0), ("SGFI", 8, 4)]
    assert "| SGFI |    8 |     4 |" in capsys.readouterr().out


class InProcess:
    """Stands for a context of processes, without starting any."""

    class Pool:
        def __init__(self, processes):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exc_info):
            pass

        def apply(self, function, arguments):
            return function(*arguments)
