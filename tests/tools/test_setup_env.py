"""The set-up script: which Pythons it takes, what it skips, what it says when a step fails."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script():
    path = ROOT / "tools" / "setup_env.py"
    spec = importlib.util.spec_from_file_location("setup_env", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_step(script, code, inputs=(), modules=()):
    command = [sys.executable, "-c", code]
    return script.Step("toy", "a toy step", [command], list(inputs), list(modules))


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12), (3, 13)])
def test_supported_versions(script, version):
    script.check_version(version, "python")


@pytest.mark.parametrize("version", [(2, 7), (3, 9), (3, 14), (4, 0)])
def test_other_versions_are_refused(script, version):
    message = r"python is Python {}\.{}, but kd_d2 needs Python 3\.10 to 3\.13".format(*version)
    with pytest.raises(script.SetupError, match=message):
        script.check_version(version, "python")


def test_step_runs_again_only_when_needed(script, tmp_path, capsys):
    count, source = tmp_path / "count", tmp_path / "input"
    source.write_text("1")
    code = f"open({str(count)!r}, 'a').write('x')"
    step = make_step(script, code, [source], ["torch"])

    script.run_step(step, "[2/4]", tmp_path, [])
    script.run_step(step, "[2/4]", tmp_path, ["torch"])
    assert count.read_text() == "x"
    source.write_text("2")
    script.run_step(step, "[2/4]", tmp_path, ["torch"])
    assert count.read_text() == "xx"
    # What the step had installed was removed.
    script.run_step(step, "[2/4]", tmp_path, [])
    assert count.read_text() == "xxx"
    assert capsys.readouterr().out.count("a toy step") == 3


def test_failure_names_step_reason_and_hint_and_leaves_no_stamp(script, tmp_path):
    good = make_step(script, "pass")
    script.run_step(good, "[2/4]", tmp_path, [])
    bad = make_step(script, "print('OSError: No space left on device'); raise SystemExit(3)")
    with pytest.raises(script.SetupError) as error:
        script.run_step(bad, "[2/4]", tmp_path, [])
    message = str(error.value)
    assert "step 'toy' failed with exit status 3" in message
    assert "    OSError: No space left on device" in message
    assert "hint: The disk is full" in message
    assert "setup-toy.log" in message
    assert not (tmp_path / "setup-toy.stamp").exists()


def test_foreign_folder_is_not_cleared(script, tmp_path):
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(script.SetupError, match="is no virtual environment"):
        script.ensure_venv(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_environment_without_working_python_is_found_out(script, tmp_path):
    assert script.inspect_venv(tmp_path) is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    assert script.inspect_venv(tmp_path) is None


def test_callers_python_path_does_not_leak(script, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("PIP_TARGET", "elsewhere")
    environment = script._clean_environment()
    assert "PYTHONPATH" not in environment and "PIP_TARGET" not in environment
    assert environment["PIP_BUILD_CONSTRAINT"].startswith("file://")


def test_make_targets_are_complete():
    # When make runs the tests, it hands its variables down.
    ours = ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "VENV", "ENV_PYTHON", "OUT", "QUICK", "WORKERS")
    environment = {key: value for key, value in os.environ.items() if key not in ours}

    def plan(*arguments):
        command = ["make", "-n", "-C", str(ROOT), "PYTHON=python3", "WORKERS=2", *arguments]
        result = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        lines = [line for line in result.stdout.splitlines() if not line.startswith("make")]
        assert lines[0].startswith("python3 tools/setup_env.py")
        return lines[-1]

    assert "-m pytest -n 2 -k x" in plan("test", "PYTEST_ARGS=-k x")
    assert plan("demo", "OUT=here", "QUICK=1").endswith('--output-dir "here" --seed "1" --quick')
    assert plan("demo").rstrip().endswith('--output-dir "demo_output" --seed "1"')
    assert "-m flake8" in plan("lint")
    plan("setup")


def test_ci_script_runs_tests_and_demo():
    path = ROOT / ".ci" / "run"
    lines = path.read_text().splitlines()
    assert path.stat().st_mode & 0o111
    assert lines.index("make test") < lines.index("make demo QUICK=1")
    subprocess.run(["bash", "-n", str(path)], check=True)
