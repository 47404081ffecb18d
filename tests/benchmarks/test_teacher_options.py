"""The benchmark of a teacher's options: what is compared with what."""

import argparse
import json

import pytest
import teacher_options as options
import torch

from tests.fixtures import tiny_model, write_gfl_pair


@pytest.fixture
def arguments(tmp_path):
    return argparse.Namespace(
        config_file=write_gfl_pair(tmp_path, "PKD"),
        image_size=(64, 64),
        batch_size=1,
        rounds=2,
        warmup=0,
        threads=0,
        clock="cpu",
        opts=[],
    )


def test_changes_are_relative_and_the_largest_counts():
    reference = {"a": 2.0, "b": -1.0, "c": 0.0}
    assert options.largest_change(reference, reference) == 0
    assert options.largest_change({"a": 2.1, "b": -1.2, "c": 0.0}, reference) == pytest.approx(0.2)
    assert options.largest_change({"a": 2.0, "b": -1.0, "c": 0.3}, reference) == pytest.approx(0.3)


def test_every_option_has_the_same_weights_and_runs_what_it_says(arguments):
    names = [options.REFERENCE, "default: both", "DTYPE bfloat16", options.EVERY_STAGE]
    figures = options.measure(arguments, names)
    assert list(figures) == names
    assert figures[options.REFERENCE]["change"] == 0
    assert figures["default: both"]["change"] < options.tolerance("default: both") == 1e-4
    assert 1e-5 < figures["DTYPE bfloat16"]["change"] < options.tolerance("DTYPE bfloat16") == 0.02
    assert figures[options.EVERY_STAGE]["change"] == figures["default: both"]["change"]
    for values in figures.values():
        assert values["teacher"]["seconds"]["median"] > 0
        assert values["step"]["seconds"]["median"] > values["teacher"]["seconds"]["median"]
    assert figures[options.REFERENCE]["step"]["ratio"]["median"] == 1
    text = options.table(figures)
    assert text.count("\n") == 5 and "| 1.000 (1.000 to 1.000) |" in text
    json.dumps(figures)


def test_a_change_above_the_tolerance_is_an_error(arguments, monkeypatch, capsys):
    spread = {"seconds": {"median": 1.0}, "ratio": {"median": 1.0, "q1": 1.0, "q3": 1.0}}
    found = {"teacher": spread, "step": spread}
    changes = {"plain": 0.0, "FUSE_BN": 2e-4, "DTYPE bfloat16": 1e-2, "DTYPE float16": float("nan")}
    monkeypatch.setattr(
        options, "measure", lambda *_: {name: {"change": c, **found} for name, c in changes.items()}
    )
    monkeypatch.setattr(options, "span", lambda *_: "")
    monkeypatch.setattr(
        "sys.argv",
        ["x", "--config-file", arguments.config_file, "--options", *list(changes)[1:]],
    )
    with pytest.raises(SystemExit, match="tolerance: FUSE_BN, DTYPE float16$"):
        options.main()
    assert "| 1.0e-02 | " in " ".join(capsys.readouterr().out.split())


def test_stages_that_nobody_asks_for_run_only_when_they_are_wanted(arguments, monkeypatch):
    calls, head = [], type(tiny_model("GFL").head).__name__

    def counted(self, *inputs, **kwargs):
        calls.append(type(self).__name__)
        return run(self, *inputs, **kwargs)

    run = torch.nn.Module.__call__
    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    with options.EventStorage(0):
        for name, heads in (("default: both", 0), (options.EVERY_STAGE, 1)):
            teacher, _, _ = options._variant(arguments, name)
            calls.clear()
            teacher()
            assert calls.count(head) == heads
