"""Every command and every piece of code in a README works as printed."""

import argparse
import pathlib
import re
import shlex
import subprocess
import sys
from typing import List, Tuple

import pytest
from detectron2.engine import default_argument_parser

from kd_d2.engine.main import build_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
READMES = sorted([ROOT / "README.md", *ROOT.glob("projects/*/README.md")])
SHELL_PROGRAMS = ("make", "python", "torchrun", "git", "cd", "export", "for", "done")


def blocks(readme: pathlib.Path, language: str) -> List[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme.read_text(), re.M | re.S)


def commands() -> List[Tuple[str, str]]:
    result = []
    for readme in READMES:
        lines = "\n".join(blocks(readme, "sh")).replace("\\\n", " ").splitlines()
        inline = re.findall(r"`((?:python|torchrun|make) [^`]+)`", readme.read_text())
        for line in lines + inline:
            line = line.split(" #")[0].strip()
            if line and not line.startswith("#"):
                result.append((str(readme.relative_to(ROOT)), line))
    return sorted(set(result))


def test_there_are_commands():
    found = [command for _, command in commands()]
    assert "make demo" in found and "make test" in found
    assert sum("train_net.py" in command for command in found) >= 4


@pytest.mark.parametrize("readme,command", commands(), ids=lambda value: value[:90])
def test_command(readme, command):
    words = shlex.split(command)
    words = [word for word in words if not re.fullmatch(r"[A-Z_0-9]+=\S*", word)] or words
    assert words[0] in SHELL_PROGRAMS, f"{readme}: unknown program in '{command}'"
    if words[0] == "make":
        check_make_target(words[1])
    elif words[0] in ("python", "torchrun"):
        check_python(words)


def check_make_target(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M), target


def check_python(words: List[str]) -> None:
    script = next(word for word in words if word.endswith(".py"))
    rest = words[words.index(script) + 1 :]
    if "..." in rest:  # an abbreviated command in running text
        return
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if script == "train_net.py":
        check_config(default_argument_parser().parse_args(rest))
    elif script == "benchmarks/step_time.py":
        check_config(benchmark_parser().parse_args(rest))
    else:
        check_options(script, rest)


def benchmark_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--image-size", nargs=2, type=int)
    for option in ("--batch-size", "--rounds", "--warmup", "--threads", "--output"):
        parser.add_argument(option)
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    return parser


def check_config(args) -> None:
    assert (ROOT / args.config_file).is_file(), f"{args.config_file} does not exist"
    build_config(str(ROOT / args.config_file), args.opts)


def check_options(script: str, rest: List[str]) -> None:
    """The options that a command uses are options that the script describes."""
    described = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for word in rest:
        if word.startswith("--"):
            assert word.split("=")[0] in described, f"{script} has no option {word}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links_lead_somewhere(readme):
    for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text()):
        if "://" not in target:
            assert (readme.parent / target).exists(), f"{readme}: {target}"


def test_method_of_your_own(tmp_path):
    """The example of the README trains, from a file beside a config."""
    from detectron2.utils.events import EventStorage

    from kd_d2.engine.trainer import KDTrainer
    from tests.fixtures import tiny_batch, tiny_cfg

    (code,) = [b for b in blocks(ROOT / "README.md", "python") if "DISTILLER_REGISTRY" in b]
    (tmp_path / "my_method.py").write_text(code)
    student = tiny_cfg("GFL").clone()
    (tmp_path / "teacher.yaml").write_text(student.dump())
    student.defrost()
    student.KD.ENABLED = True
    student.KD.DISTILLERS = ("Attention",)
    student.KD.IMPORTS = ("my_method.py",)
    student.KD.TEACHER.CONFIG_FILE = "teacher.yaml"
    student.KD.TEACHER.ALLOW_UNTRAINED = True
    (tmp_path / "student.yaml").write_text(student.dump())

    cfg = build_config(str(tmp_path / "student.yaml"))
    model = KDTrainer.build_model(cfg).train()
    with EventStorage(0):
        losses = model(tiny_batch())
    assert losses["loss_kd/attention/map"] > 0
    losses["loss_kd/attention/map"].backward()
    assert any(p.grad is not None for p in model.student.backbone.parameters())
