"""Runs the blocks of a page one after the other, as a reader would, in this process."""

import contextlib
import io
import os
import pathlib
import re
import runpy
import shlex
import socket
import subprocess
import sys
import traceback
from typing import Iterator, List

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_d2.blocks import registry as block_registries
from kd_d2.engine.main import build_config
from tests.conftest import reset_loggers
from tests.documents import ROOT, Block, check_commands, shell_lines
from tests.engine.support import isolated_registries

__all__ = ["Page"]

# What a checkout has; the folder of a page looks like one.
_CHECKOUT = ("benchmarks", "configs", "kd_d2", "projects", "tools", "train_net.py")


class Page:
    """The state between the blocks of a page: folder, variables of Python, last output.

    Attributes:
        only_checked: blocks that were not run.
    """

    def __init__(self, folder: pathlib.Path):
        """
        Args:
            folder: empty; gets links to what a checkout has, so that commands work as printed.
        """
        self.folder = folder
        for name in _CHECKOUT:
            (folder / name).symlink_to(ROOT / name)
        self.only_checked: List[Block] = []
        self._variables = {"__name__": "__main__"}
        self._output = _Output()
        self._written = {}

    def run_all(self, blocks: List[Block]) -> None:
        """Run every block; those marked "only checked" are checked as far as that goes.

        Raises:
            AssertionError: a block does not do what the page says; the message has its place and
                what it printed.
        """
        with _own_state(self.folder):
            for block in blocks:
                self._run(block)
        texts = "\n".join(block.code for block in blocks)
        for name, block in self._written.items():
            uses = texts.count(name) - block.code.count(name)
            assert uses > 0 or name.endswith(".yaml"), f"{block.where}: {name} is never used"

    def _run(self, block: Block) -> None:
        if "only checked" in block.marks:
            assert block.marks["only checked"], f"{block.where}: says no reason"
            self.only_checked.append(block)
            self._check(block)
            return
        if block.language == "text":
            self._compare(block)
            return
        run = {"sh": self._shell, "python": self._python, "yaml": self._yaml}.get(block.language)
        assert run, f"{block.where}: no way to run a block of '{block.language}'"
        self._output.clear()
        with contextlib.redirect_stdout(self._output), contextlib.redirect_stderr(self._output):
            problem = self._problem(run, block)
        if "fails" in block.marks:
            assert problem, f"{block.where} has to fail"
            self._output.write(problem)
        else:
            assert not problem, f"{block.where}: {problem}\n{self._output.tail()}"

    @staticmethod
    def _problem(run, block: Block) -> str:
        """The message of what went wrong; empty if nothing did."""
        try:
            run(block)
        except SystemExit as error:
            return "" if error.code in (None, 0) else str(error.code)
        except Exception as error:
            return "".join(traceback.format_exception(error))
        return ""

    # ------------------------------------------------------------------------------ languages
    def _python(self, block: Block) -> None:
        if block.file_name:
            self._write(block)
            compile(block.code, block.file_name, "exec")
        else:
            exec(compile(block.code, block.where, "exec"), self._variables)

    def _yaml(self, block: Block) -> None:
        assert block.file_name, f"{block.where}: the first line names no file"
        self._write(block)
        build_config(block.file_name)

    def _write(self, block: Block) -> None:
        pathlib.Path(block.file_name).write_text(block.code)
        self._written[block.file_name] = block

    def _shell(self, block: Block) -> None:
        extra = shlex.split(block.marks.get("short", ""))
        commands = [shlex.split(line) for line in shell_lines(block.code)]
        if "processes" in block.marks:
            commands = [_with_processes(words, block.marks["processes"]) for words in commands]
        if "together" in block.marks:
            self._together([words + extra for words in _on_this_machine(commands)])
            return
        for words in commands:
            self._command(words, extra)

    def _command(self, words: List[str], extra: List[str]) -> None:
        environment = {}
        while re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
            name, _, environment[name] = words.pop(0).partition("=")
        if words[0] in ("mkdir", "torchrun"):
            self._process(words + extra, environment)
            return
        assert words[0] == "python", f"no way to run '{' '.join(words)}'"
        reset_loggers()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            if words[1] == "-m":
                patch.setattr(sys, "argv", [words[2], *words[3:], *extra])
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            elif "--num-gpus" in words:  # starts processes, which import this one's main module
                self._process(words + extra, environment)
            else:
                patch.setattr(sys, "argv", [*words[1:], *extra])
                patch.syspath_prepend(str(pathlib.Path(words[1]).resolve().parent))
                with _ended_normally():
                    runpy.run_path(words[1], run_name="__main__")

    def _process(self, words: List[str], environment) -> None:
        self._together([words], environment)

    def _together(self, commands: List[List[str]], environment=()) -> None:
        """Run commands at the same time, each in a process of its own."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **dict(environment),
        }
        started = []
        try:
            for number, words in enumerate(commands):
                output = open(self.folder / f".output{number}", "w+")
                started.append((subprocess.Popen(
                    _program(words), env=environment, stdout=output, stderr=subprocess.STDOUT,
                ), output))  # fmt: skip
            codes = [process.wait(timeout=500) for process, _ in started]
        finally:
            for process, output in started:
                process.kill()
                output.seek(0)
                self._output.write(output.read())
                output.close()
        if any(codes):
            sys.exit(next(code for code in codes if code))

    # --------------------------------------------------------------------------------- checks
    def _compare(self, block: Block) -> None:
        """Every line of an expected output is in what the last block printed; "..." is anything.

        Lines are compared without regard to where they are broken.
        """
        printed = " ".join(self._output.getvalue().split())
        for line in block.code.splitlines():
            parts = [re.escape(" ".join(part.split())) for part in line.split("...")]
            pattern = r"\s?.*?\s?".join(parts)
            assert re.search(
                pattern, printed
            ), f"{block.where}: was not printed: {line}\n{self._output.tail()}"

    def _check(self, block: Block) -> None:
        if block.language == "sh":
            check_commands(block.code, block.where)
        elif block.language == "python":
            compile(block.code, block.where, "exec")
        elif block.language == "yaml":
            self._yaml(block)
        else:
            raise AssertionError(f"{block.where}: no way to check '{block.language}'")


def _program(words: List[str]) -> List[str]:
    """The command with this Python."""
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    return [sys.executable, *words[1:]] if words[0] == "python" else words


def _with_processes(words: List[str], number: str) -> List[str]:
    """The command with so many processes; those of one without a launcher run in this process."""
    words = list(words)
    for option in ("--num-gpus", "--nproc-per-node"):
        if option in words:
            words[words.index(option) + 1] = number
    if number == "1" and "--num-gpus" in words and "--num-machines" not in words:
        place = words.index("--num-gpus")
        del words[place : place + 2]
    return words


def _on_this_machine(commands: List[List[str]]) -> List[List[str]]:
    """Commands for several machines with this one's address, and one free port for all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    result = []
    for words in commands:
        words = [re.sub(r"tcp://.*", f"tcp://127.0.0.1:{port}", word) for word in words]
        for option, value in (("--master-addr", "127.0.0.1"), ("--master-port", port)):
            if option in words:
                words[words.index(option) + 1] = value
        result.append(words)
    return result


class _Output(io.StringIO):
    """What was printed by the current block, by loggers of earlier ones too."""

    def clear(self) -> None:
        self.seek(0)
        self.truncate()

    def tail(self) -> str:
        return self.getvalue()[-4000:]


@contextlib.contextmanager
def _ended_normally() -> Iterator[None]:
    """``sys.exit(0)``, or with None, is the normal end of a script."""
    try:
        yield
    except SystemExit as error:
        if error.code not in (None, 0):
            raise


@contextlib.contextmanager
def _own_state(folder: pathlib.Path) -> Iterator[None]:
    """What a page registers, imports and sets is gone afterwards."""
    kinds = ("SOURCES", "REGIONS", "ADAPTERS", "TRANSFORMS", "DISTANCES", "NORMALISERS")
    registries = [getattr(block_registries, f"KD_{kind}") for kind in kinds]
    before = [dict(registry._obj_map) for registry in registries]
    names = set(DatasetCatalog.list())
    modules = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch, isolated_registries():
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("DETECTRON2_DATASETS", str(folder / "datasets"))
        try:
            yield
        finally:
            for registry, objects in zip(registries, before):
                registry._obj_map.clear()
                registry._obj_map.update(objects)
            for name in set(DatasetCatalog.list()) - names:
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)
            for name in set(sys.modules) - modules:
                file = getattr(sys.modules[name], "__file__", None) or ""
                if file.startswith(str(folder)) and not os.path.islink(file):
                    sys.modules.pop(name)
            reset_loggers()
