#!/usr/bin/env python3
"""Make the virtual environment in which kd_d2's commands run; ``make setup`` calls this.

Steps: the environment itself, pip and setuptools, kd_d2 (editable) with its requirements in the
versions of requirements/constraints.txt, Detectron2. A finished step leaves a stamp with the
fingerprint of the files it depends on, and is skipped as long as that is the same. Each step
writes a log, ``setup-<step>.log`` in the environment's folder; when one fails, its name, the last
lines of its log and, where the cause is recognised, a hint are printed.

    python tools/setup_env.py [--venv .venv] [--until requirements]

``--until requirements`` stops before Detectron2, for those who build it from its own repository.
Only the standard library is used.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
INSTALLER = ROOT / "tools" / "install_detectron2.py"
EXTRAS = "demo,docs,lint,test"

OLDEST, NEWEST = (3, 10), (3, 13)

# Looked for in an existing environment.
_MODULES = ["setuptools", "torch", "torchvision", "kd_d2", "detectron2"]
# Seconds without a sign of life before the last line of the log is shown.
_HEARTBEAT = 20
_NUM_LINES = 25

# (text that occurs in the log, what to do about it)
_HINTS = (
    ("No space left on device", "The disk is full; the environment takes about 6 GB."),
    ("Could not find a version", "pip found no suitable file: is the network or mirror reachable?"),
    ("NewConnectionError", "The package index cannot be reached: check network and proxy."),
    ("Read timed out", "The network is slow: run the command again, it goes on where it stopped."),
    ("THESE PACKAGES DO NOT MATCH THE HASHES", "A download was damaged: run the command again."),
    ("ensurepip", "Python lacks the module venv; on Debian and Ubuntu, install python3-venv."),
    ("error: command 'gcc' failed", "A C compiler and Python's headers are needed."),
)


class SetupError(RuntimeError):
    """A step failed; the message says which and why."""


class Step(NamedTuple):
    """One step of the set-up.

    Attributes:
        name: short name, part of the names of log and stamp.
        title: what is printed while it runs.
        commands: run one after the other until one fails.
        inputs: files whose change makes the step run again.
        modules: what can be imported afterwards; the step runs again if one is gone.
    """

    name: str
    title: str
    commands: List[List[str]]
    inputs: List[Path]
    modules: List[str]


class Environment(NamedTuple):
    """A working virtual environment.

    Attributes:
        version: major and minor version of its Python.
        modules: those of ``_MODULES`` that it has.
    """

    version: Tuple[int, int]
    modules: List[str]


def check_version(version: Tuple[int, int], what: str) -> None:
    """Raise :class:`SetupError` if this Python version is not supported.

    Args:
        version: major and minor version.
        what: the interpreter's name for the message.
    """
    if not OLDEST <= version <= NEWEST:
        raise SetupError(
            "{} is Python {}.{}, but kd_d2 needs Python {}.{} to {}.{}: pass another one, for "
            "example `make setup PYTHON=python3.12`.".format(what, *version, *OLDEST, *NEWEST)
        )


def inspect_venv(venv: Path) -> Optional[Environment]:
    """Return what the environment has, None if its Python or its pip does not work."""
    if not (venv / "bin" / "python").exists():
        return None
    code = (
        "import pip, sys; from importlib.util import find_spec; print(*sys.version_info[:2], "
        "*(name for name in {!r} if find_spec(name)))".format(_MODULES)
    )
    result = subprocess.run(
        [str(venv / "bin" / "python"), "-c", code],
        cwd=str(venv),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_clean_environment(),
    )
    if result.returncode != 0:
        return None
    major, minor, *modules = result.stdout.decode().split()
    return Environment((int(major), int(minor)), modules)


def ensure_venv(venv: Path) -> List[str]:
    """Create the environment unless there is a working one, of whichever supported version.

    Returns:
        Those of ``_MODULES`` that it has.
    """
    current = tuple(sys.version_info[:2])
    if venv.exists():
        found = inspect_venv(venv)
        if found is not None:
            check_version(found.version, str(venv / "bin" / "python"))
            if found.version != current:
                _say("using {} as it is, with Python {}.{}".format(venv.name, *found.version))
            return found.modules
        if any(venv.iterdir()) and not (venv / "pyvenv.cfg").is_file():
            raise SetupError(
                "{} exists but is no virtual environment: move it away, or choose another folder "
                "with `make setup VENV=DIR`.".format(venv)
            )
        _say("{} is incomplete or its Python is gone: making it anew".format(venv.name))
    check_version(current, sys.executable)
    _say("[1/4] virtual environment {} (Python {}.{})".format(venv.name, *current))
    result = _venv(venv)
    if result.returncode == 0:
        return []
    # Debian's Python without python3-venv cannot put pip into the environment, but pip can.
    bare = _venv(venv, "--without-pip")
    if bare.returncode == 0:
        command = [sys.executable, "-m", "pip", "--python", str(venv), "install", "pip"]
        command += ["--constraint", CONSTRAINTS.as_uri()]
        pip = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_clean_environment()
        )
        if pip.returncode == 0:
            return []
    log = result.stdout.decode(errors="replace")
    raise SetupError(_failure("environment", result.returncode, log, None))


def build_steps(venv: Path) -> List[Step]:
    """Return the steps that follow the creation of the environment."""
    python = str(venv / "bin" / "python")
    install = [python, "-m", "pip", "install", "--progress-bar", "off"]
    install += ["--constraint", CONSTRAINTS.as_uri()]
    return [
        Step(
            "pip",
            "pip and setuptools",
            [install + ["pip", "setuptools"]],
            [CONSTRAINTS],
            ["setuptools"],
        ),
        Step(
            "requirements",
            "kd_d2 and its requirements (several GB with PyTorch, takes minutes)",
            [install + ["--editable", ".[{}]".format(EXTRAS)]],
            [CONSTRAINTS, ROOT / "setup.cfg", ROOT / "setup.py"],
            ["torch", "torchvision", "kd_d2"],
        ),
        Step(
            "detectron2",
            "Detectron2",
            [[python, str(INSTALLER)]],
            [CONSTRAINTS, INSTALLER],
            ["detectron2"],
        ),
    ]


def run_step(step: Step, label: str, venv: Path, modules: List[str]) -> None:
    """Run one step unless its stamp says that it is done.

    Args:
        step: the step.
        label: its number, for the messages.
        venv: the environment's folder.
        modules: those of ``_MODULES`` that the environment had at the start.
    """
    stamp = venv / "setup-{}.stamp".format(step.name)
    fingerprint = _fingerprint(step, venv)
    complete = set(step.modules) <= set(modules)
    if complete and stamp.is_file() and stamp.read_text() == fingerprint:
        return
    if stamp.exists():
        stamp.unlink()
    log = venv / "setup-{}.log".format(step.name)
    _say("{} {}; log: {}".format(label, step.title, os.path.relpath(log)))
    start = time.monotonic()
    with log.open("wb") as stream:
        for command in step.commands:
            status = _run_logged(command, stream, log)
            if status != 0:
                stream.flush()
                text = log.read_text(errors="replace")
                raise SetupError(_failure(step.name, status, text, log))
    stamp.write_text(fingerprint)
    _say("{} done in {:.0f} s".format(label, time.monotonic() - start))


def set_up(venv: Path, until: Optional[str] = None) -> None:
    """Do all steps that are not done yet.

    Args:
        venv: the environment's folder.
        until: name of the last step to do; None does all.

    Raises:
        SetupError: a step failed, or the Python version is not supported.
    """
    with _Lock():
        modules = ensure_venv(venv)
        for number, step in enumerate(build_steps(venv), start=2):
            run_step(step, "[{}/4]".format(number), venv, modules)
            if step.name == until:
                return


def main(argv: Optional[List[str]] = None) -> int:
    """Run the script; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder (.venv)")
    parser.add_argument("--until", choices=["pip", "requirements"], help="last step to do")
    args = parser.parse_args(argv)
    try:
        set_up(args.venv.absolute(), args.until)
    except SetupError as error:
        sys.stdout.flush()
        print("set-up: error: {}".format(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("set-up: interrupted; the next run goes on with the unfinished step", file=sys.stderr)
        return 130
    return 0


class _Lock:
    """Lets one set-up of this checkout run at a time; a second one waits."""

    def __enter__(self) -> "_Lock":
        self._file = open(__file__, "rb")
        try:
            import fcntl
        except ImportError:
            return self
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another set-up of this checkout")
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks: go on as if alone.
            pass
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()


def _venv(venv: Path, *options: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "venv", "--clear", *options, str(venv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_clean_environment(),
    )


def _clean_environment() -> Dict[str, str]:
    """The caller's environment without what would mix other packages into ours."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key
        not in ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "__PYVENV_LAUNCHER__")
    }
    environment["PIP_USER"] = "0"
    environment["PIP_NO_INPUT"] = "1"
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    # Source distributions are built with the pinned setuptools: pip before 25.3 reads the first
    # variable in isolated builds, later ones the second. URIs, since pip splits at spaces.
    environment["PIP_CONSTRAINT"] = CONSTRAINTS.as_uri()
    environment["PIP_BUILD_CONSTRAINT"] = CONSTRAINTS.as_uri()
    return environment


def _fingerprint(step: Step, venv: Path) -> str:
    digest = hashlib.sha256()
    # An editable installation holds the path of the checkout, so a moved one is installed anew.
    for text in (str(ROOT), str(venv), step.name, repr(step.commands)):
        digest.update(text.encode() + b"\0")
    for path in step.inputs:
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest() + "\n"


def _run_logged(command: List[str], stream, log: Path) -> int:
    """Run ``command`` with its output in the log; now and then show the log's last line."""
    process = subprocess.Popen(
        command,
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
        env=_clean_environment(),
    )
    start = time.monotonic()
    try:
        while True:
            try:
                return process.wait(timeout=_HEARTBEAT)
            except subprocess.TimeoutExpired:
                lines = [line for line in log.read_text(errors="replace").splitlines() if line]
                last = lines[-1].strip()[:80] if lines else ""
                _say("      {:.0f} s: {} ...".format(time.monotonic() - start, last))
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _failure(name: str, status: int, text: str, log: Optional[Path]) -> str:
    lines = [line for line in text.splitlines() if line.strip()][-_NUM_LINES:]
    where = "" if log is None else " of {}".format(os.path.relpath(log))
    message = "step '{}' failed with exit status {}; last lines{}:\n".format(name, status, where)
    message += "\n".join("    " + line for line in lines)
    for pattern, hint in _HINTS:
        if pattern in text:
            message += "\nset-up: hint: {}".format(hint)
    return message


def _say(message: str) -> None:
    print("set-up: " + message, flush=True)


if __name__ == "__main__":
    sys.exit(main())
