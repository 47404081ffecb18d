#!/usr/bin/env python3
"""Install Detectron2 0.6 into the active environment, or say that it is there already.

Detectron2 is not on PyPI under its own name. Its Python code is, as a folder of the wheel
``LabGym``: this script downloads that wheel, checks its SHA-256, takes nothing but the folder
``LabGym/detectron2`` (Detectron2, Apache-2.0, copyright Meta Platforms and contributors; the rest
of that wheel is under the GPL and is not used), changes the import prefix ``LabGym.detectron2``
back to ``detectron2``, and installs the result as an ordinary distribution ``detectron2``, which
``pip uninstall detectron2`` removes again.

The result has no compiled operators. Whoever needs them (deformable convolution, rotated boxes)
builds Detectron2 from its own repository first; this script then leaves it alone.

    python tools/install_detectron2.py                       # install
    python tools/install_detectron2.py --wheel-dir wheels    # only write the wheel

On a machine without network, install the written wheel and its requirements with
``pip install --no-index --find-links DIR detectron2``.

Only the standard library and pip are used.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

SOURCE_PROJECT = "LabGym"
SOURCE_VERSION = "3.1.2"
SOURCE_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
SOURCE_FOLDER = "LabGym/detectron2/"

VERSION = "0.6"
WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"

# What Detectron2's own setup.py asks for, without black (used only to print configs of its
# "lazy" kind) and without a back-port for Python 3.6. Added: setuptools, because the model zoo
# imports pkg_resources, which setuptools announces to remove after version 80.
REQUIREMENTS = (
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore<0.1.6,>=0.1.5",
    "hydra-core>=1.1",
    "iopath<0.1.10,>=0.1.7",
    "matplotlib",
    "omegaconf<2.4,>=2.1",
    "packaging",
    "pycocotools>=2.0.2",
    "setuptools<81",
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)

ROOT = Path(__file__).resolve().parents[1]
LICENSE_FILE = ROOT / "LICENSE"
CONSTRAINTS_FILE = ROOT / "requirements" / "constraints.txt"

_PREFIX = "LabGym.detectron2"
# Zip archives cannot store anything earlier.
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)

_PROBE = """
import importlib.util, json
answer = {}
for name in ("torch", "detectron2"):
    spec = importlib.util.find_spec(name)
    answer[name] = spec and (spec.origin or str(list(spec.submodule_search_locations)))
if answer["detectron2"] is not None:
    try:
        import detectron2
        answer["version"] = detectron2.__version__
        answer["origin"] = detectron2.__file__
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(answer))
"""


class InstallError(RuntimeError):
    """Something that the user can mend; the message is one sentence that says what and how."""


class Environment(NamedTuple):
    """What the active environment has.

    Attributes:
        has_torch: PyTorch can be found.
        version: version of the Detectron2 that imports, or None.
        location: where Detectron2 was found, whether it imports or not, or None.
        error: why it does not import, or None.
    """

    has_torch: bool
    version: Optional[str]
    location: Optional[str]
    error: Optional[str]


def inspect_environment(python: str = sys.executable) -> Environment:
    """Say what ``import detectron2`` does in a fresh process.

    Args:
        python: the interpreter of the environment.
    """
    # The working directory is this folder, lest a checkout of Detectron2 in the caller's be found.
    result = subprocess.run(
        [python, "-c", _PROBE],
        cwd=Path(__file__).resolve().parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if result.returncode != 0:
        raise InstallError(
            f"{python} could not be examined (exit status {result.returncode}): "
            f"{_last_line(result.stderr)}"
        )
    answer = json.loads(result.stdout.splitlines()[-1])
    return Environment(
        has_torch=answer["torch"] is not None,
        version=answer.get("version"),
        location=answer.get("origin") or answer["detectron2"],
        error=answer.get("error"),
    )


def download_source(folder: Path) -> Path:
    """Download the source wheel with pip and return its path.

    Args:
        folder: an existing empty folder to put it in.
    """
    requirement = f"{SOURCE_PROJECT}=={SOURCE_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--ignore-requires-python", "--progress-bar", "off", "--dest", str(folder)]
    result = subprocess.run(
        command + [requirement], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        sys.stderr.write(result.stdout)
        raise InstallError(
            f"pip could not download {requirement} (its messages are above): check the network, "
            "or fetch that wheel on another machine and pass it with --wheel FILE."
        )
    return wheels[0]


def read_source(path: Path, sha256: str = SOURCE_SHA256) -> Dict[str, bytes]:
    """Return Detectron2's files in the source wheel, by their path below ``detectron2/``.

    Args:
        path: the source wheel.
        sha256: digest that the file must have.

    Raises:
        InstallError: the file is missing or is not the expected one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InstallError(f"The wheel {path} cannot be read: {error.strerror}.") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise InstallError(
            f"{path.name} has SHA-256 {digest}, expected {sha256}: it is damaged or not the "
            f"published wheel of {SOURCE_PROJECT} {SOURCE_VERSION}, so nothing of it is used; "
            "download it again."
        )
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {
            name[len(SOURCE_FOLDER) :]: archive.read(name)
            for name in archive.namelist()
            if name.startswith(SOURCE_FOLDER) and not name.endswith("/")
        }


def restore_prefix(files: Dict[str, bytes]) -> Dict[str, bytes]:
    """Return ``files`` with the import prefix of the source wheel changed back to ``detectron2``.

    In the published wheel the prefix occurs in imports, dotted names in strings (targets of
    ``instantiate``, names of loggers, ``find_spec``) and docstrings, always spelled the same, so
    that one substitution in the .py files serves all. Other files are not changed.

    Args:
        files: contents by path below ``detectron2/``.

    Raises:
        InstallError: another trace of the source's name remains, the result is not valid Python,
            or it is not the expected version.
    """
    pattern = re.compile(rb"\b" + re.escape(_PREFIX.encode()) + rb"\b")
    restored = {}
    for name, data in files.items():
        if name.endswith(".py"):
            data = pattern.sub(b"detectron2", data)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    compile(data, name, "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:
                raise InstallError(f"{name} is not valid Python any more: {error}.") from error
        if SOURCE_PROJECT.lower().encode() in data.lower():
            raise InstallError(
                f"{name} mentions {SOURCE_PROJECT} in a form that this script does not know how "
                "to change."
            )
        restored[name] = data
    version = re.search(rb'^__version__ = "(.+)"', restored.get("__init__.py", b""), re.MULTILINE)
    found = version.group(1).decode() if version else "none"
    if found != VERSION:
        raise InstallError(f"The wheel holds Detectron2 {found}, expected {VERSION}.")
    return restored


def build_wheel(files: Dict[str, bytes], sha256: str, license_text: bytes) -> bytes:
    """Return the bytes of an installable wheel; equal input gives equal bytes everywhere.

    Args:
        files: contents by path below ``detectron2/``, as :func:`restore_prefix` returns them.
        sha256: digest of the wheel they came from, for the provenance note.
        license_text: the Apache License 2.0.
    """
    info = f"detectron2-{VERSION}.dist-info"
    entries = {f"detectron2/{name}": data for name, data in files.items()}
    entries[f"{info}/METADATA"] = _metadata().encode()
    entries[f"{info}/PROVENANCE.txt"] = _provenance(sha256).encode()
    entries[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\n"
        b"Generator: install_detectron2 (kd_d2)\n"
        b"Root-Is-Purelib: true\n"
        b"Tag: py3-none-any\n"
    )
    entries[f"{info}/licenses/LICENSE"] = license_text
    entries[f"{info}/top_level.txt"] = b"detectron2\n"
    record = f"{info}/RECORD"
    rows = [f"{name},{_record_hash(data)},{len(data)}" for name, data in sorted(entries.items())]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in sorted(entries.items()):
            _write_member(archive, name, data)
        _write_member(archive, record, "\n".join([*rows, f"{record},,", ""]).encode())
    return buffer.getvalue()


def make_wheel(folder: Path, source: Optional[Path] = None, sha256: str = SOURCE_SHA256) -> Path:
    """Write Detectron2's wheel into ``folder`` and return its path.

    Args:
        folder: where to; created if missing.
        source: the source wheel if it was downloaded already; None downloads it.
        sha256: digest that the source wheel must have.
    """
    if not LICENSE_FILE.is_file():
        raise InstallError(
            f"{LICENSE_FILE} is missing, whose text goes into the wheel: run this script from a "
            "complete checkout of kd_d2."
        )
    with tempfile.TemporaryDirectory() as scratch:
        if source is None:
            _say(f"downloading {SOURCE_PROJECT} {SOURCE_VERSION}, which contains Detectron2")
            source = download_source(Path(scratch))
        files = restore_prefix(read_source(source, sha256))
    wheel = build_wheel(files, sha256, LICENSE_FILE.read_bytes())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WHEEL_NAME).write_bytes(wheel)
    except OSError as error:
        raise InstallError(
            f"The wheel cannot be written to {folder}: {error.strerror}; choose another folder."
        ) from error
    return folder / WHEEL_NAME


def pip_install(wheel: Path, constraints: Optional[Path]) -> None:
    """Install ``wheel`` and its requirements into the environment of this interpreter.

    Args:
        wheel: a wheel file.
        constraints: a file of version constraints, also used while source distributions among
            the requirements are built; None: no constraints.
    """
    environment = dict(os.environ)
    if constraints is not None:
        # As a URI, because pip splits these variables at spaces. The second is what pip 25.3 and
        # later read for isolated builds; older versions use the first for both.
        environment["PIP_CONSTRAINT"] = constraints.resolve().as_uri()
        environment["PIP_BUILD_CONSTRAINT"] = environment["PIP_CONSTRAINT"]
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", str(wheel)]
    status = subprocess.run(command, env=environment).returncode
    if status != 0:
        raise InstallError(
            f"pip install {wheel.name} failed with exit status {status}; its messages are above."
        )


def install(source: Optional[Path], constraints: Optional[Path]) -> None:
    """Put Detectron2 into the active environment unless it is there.

    Args:
        source: the source wheel if it was downloaded already; None downloads it.
        constraints: see :func:`pip_install`.

    Raises:
        InstallError: the environment lacks PyTorch, has a Detectron2 that does not import, or a
            step failed.
    """
    state = inspect_environment()
    if state.version is not None:
        _say(f"Detectron2 {state.version} is installed already, in {Path(state.location).parent}")
        return
    if not state.has_torch:
        raise InstallError(
            "PyTorch is not installed in this environment: install torch and torchvision first, "
            "or let `make setup` do it all."
        )
    if state.location is not None:
        raise InstallError(
            f"There is a detectron2 in {state.location}, but it cannot be imported "
            f"({state.error}): mend it, or remove it (pip uninstall detectron2) and run this again."
        )
    if constraints is not None and not constraints.is_file():
        raise InstallError(
            f"The constraints file {constraints} does not exist: pass another with --constraint, "
            "or --constraint '' for none."
        )
    with tempfile.TemporaryDirectory() as scratch:
        wheel = make_wheel(Path(scratch), source)
        _say(f"installing {wheel.name} and its requirements")
        pip_install(wheel, constraints)
    state = inspect_environment()
    if state.version is None:
        raise InstallError(f"Detectron2 was installed but does not import: {state.error}.")
    _say(f"installed Detectron2 {state.version} in {Path(state.location).parent}")


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--wheel",
        metavar="FILE",
        type=Path,
        help=f"use this wheel of {SOURCE_PROJECT} {SOURCE_VERSION} instead of downloading it",
    )
    parser.add_argument(
        "--wheel-dir",
        metavar="DIR",
        type=Path,
        help=f"only write {WHEEL_NAME} into this folder and install nothing",
    )
    parser.add_argument(
        "--constraint",
        metavar="FILE",
        default=str(CONSTRAINTS_FILE),
        help="version constraints for the requirements; '' for none (default: kd_d2's own)",
    )
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the script; returns the exit status."""
    args = parse_args(argv)
    try:
        if args.wheel_dir is not None:
            _say(f"wrote {make_wheel(args.wheel_dir, args.wheel)}")
        else:
            install(args.wheel, Path(args.constraint) if args.constraint else None)
    except InstallError as error:
        sys.stdout.flush()
        print(f"install_detectron2: error: {error}", file=sys.stderr)
        return 1
    return 0


def _metadata() -> str:
    lines = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {VERSION}",
        "Summary: Meta's library for object detection and segmentation (Python part only)",
        "Home-page: https://github.com/facebookresearch/detectron2",
        "Author: FAIR",
        "License: Apache-2.0",
        "License-File: LICENSE",
        "Requires-Python: >=3.7",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
        "",
        "The Python code of Detectron2, without its compiled operators; PyTorch and torchvision",
        "are needed, but not required here, so that any build of them may be used.",
        "PROVENANCE.txt beside this file says where the code comes from and what was changed.",
    ]
    return "".join(f"{line}\n" for line in lines)


def _provenance(sha256: str) -> str:
    return (
        f"The files in detectron2/ are those of the folder {SOURCE_FOLDER} in the wheel\n"
        f"{SOURCE_PROJECT} {SOURCE_VERSION} with SHA-256\n"
        f"{sha256}.\n"
        "\n"
        "They are Detectron2, copyright Facebook, Inc. (Meta Platforms) and its affiliates, under\n"
        "the Apache License 2.0, whose text is in licenses/LICENSE. Nothing else of that wheel is\n"
        "contained here.\n"
        "\n"
        "Changed by tools/install_detectron2.py of kd_d2: in the .py files, the import prefix\n"
        f"{_PREFIX} became detectron2. Nothing else was changed.\n"
    )


def _record_hash(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"


def _write_member(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    # Stored, not deflated: the output of zlib differs between its versions.
    member = zipfile.ZipInfo(name, _TIMESTAMP)
    member.create_system = 3
    member.external_attr = 0o100644 << 16
    archive.writestr(member, data)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"


def _say(message: str) -> None:
    print(f"install_detectron2: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
