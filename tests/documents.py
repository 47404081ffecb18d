"""Code and commands in Markdown files: how they are found, and checked without being run."""

import argparse
import functools
import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Dict, List

from detectron2.engine import default_argument_parser

from kd_d2.engine.main import build_config

__all__ = ["Block", "SHELL", "blocks", "check_commands", "parse_page", "shell_lines"]

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHELL = ("make", "python", "torchrun", "git", "cd", "export", "for", "done", "mkdir")

# A fenced block, or a comment of HTML that begins with one of these words.
_PART = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=fence)[ ]*$"
    r"|^<!-- (?P<word>hidden|only checked|short|fails|processes|together)\b:?[ ]?"
    r"(?P<text>.*?)-->[ ]*$",
    re.M | re.S,
)


@dataclass
class Block:
    """A piece of code of a page.

    Attributes:
        page: file name, for messages.
        line: of the file where it begins, from 1.
        language: first word of the fence's info string.
        code: what is between the fences.
        hidden: it is in a comment, hence not on the page.
        marks: what the comments right before it say, by their first words: "only checked" (why it
            is not run), "short" (overrides that make it quick), "fails" (it has to), "processes"
            (how many take the place of a machine's GPUs; they run on the CPU), "together" (its
            lines run at the same time, as on several machines).
    """

    page: str
    line: int
    language: str
    code: str
    hidden: bool = False
    marks: Dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file_name(self) -> str:
        """The file that the first line names, ``# name.py``; empty if it names none."""
        match = re.match(r"# ([\w./-]+\.\w+)\n", self.code)
        return match.group(1) if match else ""


def parse_page(path: pathlib.Path, name: str = "") -> List[Block]:
    """Return every block of a Markdown file, in order, those in comments included.

    Directives (```` ```{name} ````) are no code and left out.

    Raises:
        ValueError: a comment that marks a block stands before none; a fence that is indented or
            not closed, which this parser would not see.
    """
    text = path.read_text()
    name = name or path.name
    result, marks, end = [], {}, 0
    for part in _PART.finditer(text):
        if marks and text[end : part.start()].strip():
            raise ValueError(f"{name}: a comment before line {_line(text, part.start())} marks "
                             "nothing")  # fmt: skip
        end = part.end()
        line = _line(text, part.start())
        if part["word"] == "hidden":
            language, _, code = part["text"].partition("\n")
            result.append(Block(name, line, language.strip(), code, True, marks))
        elif part["word"]:
            marks[part["word"]] = " ".join(part["text"].split())
            continue
        elif not part["info"].startswith("{"):
            language = (part["info"].split() or [""])[0]
            result.append(Block(name, line, language, part["code"], False, marks))
        marks = {}
    if marks:
        raise ValueError(f"{name}: the last comment marks nothing")
    left = re.search(r"^[ >]*(```|~~~)", _PART.sub("", text), re.M)
    if left:
        raise ValueError(f"{name}: a fence is indented or not closed: {left.group(0)!r}")
    return result


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def blocks(path: pathlib.Path, language: str) -> List[str]:
    """The visible code of one language."""
    return [b.code for b in parse_page(path) if b.language == language and not b.hidden]


def shell_lines(code: str) -> List[str]:
    """The commands of a shell block: one a line, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    lines = [line.split(" #")[0].strip() for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


def check_commands(code: str, origin: str) -> None:
    """Check the commands of a shell block as far as that goes without running them.

    Scripts exist, their options are described by their help, config files exist and build with
    the overrides of the command. Variables that a line of its own sets are known to later ones.
    """
    variables: Dict[str, str] = {}
    for line in shell_lines(code):
        assignments = [word.partition("=") for word in shlex.split(line)]
        if all(re.fullmatch("[A-Z_0-9]+", name) and equals for name, equals, _ in assignments):
            variables.update((name, value) for name, _, value in assignments)
            continue
        for name, value in variables.items():
            line = re.sub(rf"\$(?:{name}\b|{{{name}}})", value, line)
        _check_command(line, origin)


def _check_command(command: str, origin: str) -> None:
    words = shlex.split(command)
    words = [word for word in words if not re.fullmatch(r"[A-Z_0-9]+=\S*", word)]
    assert words[0].rstrip(";") in SHELL, f"{origin}: unknown program in '{command}'"
    if words[0] == "make":
        _check_make_target(words[1])
    elif words[0] in ("python", "torchrun"):
        _check_python(words)


def _check_make_target(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M), target


def _check_python(words: List[str]) -> None:
    if words[1] == "-m":
        module = words[2]
        assert importlib.util.find_spec(module), f"there is no module {module}"
        _check_options(("-m", module), words[3:])
        return
    script = next(word for word in words if word.endswith(".py"))
    rest = words[words.index(script) + 1 :]
    if "..." in rest:  # an abbreviated command in running text
        return
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if script == "train_net.py":
        _check_config(default_argument_parser().parse_args(rest))
    elif script == "benchmarks/step_time.py":
        args = _benchmark_parser().parse_args(rest)
        assert args.config_file or args.table
        for file in args.config_file:
            _check_config(argparse.Namespace(config_file=file, opts=args.opts))
    else:
        _check_options((script,), rest)


def _benchmark_parser() -> argparse.ArgumentParser:
    spec = importlib.util.spec_from_file_location("step_time", ROOT / "benchmarks/step_time.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_parser()


def _check_config(args) -> None:
    assert (ROOT / args.config_file).is_file(), f"{args.config_file} does not exist"
    build_config(str(ROOT / args.config_file), args.opts)


def _check_options(script, rest: List[str]) -> None:
    """The options that a command uses are options that the script describes."""
    described = _help_of(script)
    for word in rest:
        if word.startswith("--"):
            assert word.split("=")[0] in described, f"{script[-1]} has no option {word}"
    if "--config-file" in rest:
        file = rest[rest.index("--config-file") + 1]
        if file.startswith(("configs/", "projects/")):  # others are made by earlier commands
            assert (ROOT / file).is_file(), f"{file} does not exist"


@functools.lru_cache(maxsize=None)
def _help_of(script) -> str:
    return subprocess.run(
        [sys.executable, *script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
