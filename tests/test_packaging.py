"""What gets into the wheel, and that kd_d2 imports from a checkout, editable and from the wheel."""

import configparser
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kd_d2

ROOT = Path(__file__).resolve().parents[1]
TOY = "kd_d2.projects.toymethod.parts"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what is packaged, with one more project, ``ToyMethod``."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("kd_d2", "projects"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("setup.cfg", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy / name)
    parts = copy / "projects" / "ToyMethod" / "toymethod" / "parts"
    parts.mkdir(parents=True)
    (parts.parent / "__init__.py").write_text("NAME = 'toy'\n")
    (parts / "__init__.py").write_text("from .. import NAME\n")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """The wheel built from the copy."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--disable-pip-version-check", "--wheel-dir", str(folder)]
    result = subprocess.run(
        [*command, str(checkout)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    (path,) = folder.glob("*.whl")
    return path


def run_python(code, cwd, site=None):
    """Run ``code`` without any installed package, except those in the folder ``site``."""
    if site is not None:
        code = f"import site; site.addsitedir({str(site)!r})\n{code}"
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode().strip()


def import_toy(cwd, site=None):
    """Import the toy project in a new process and return the file it came from."""
    code = f"import {TOY} as toy; assert toy.NAME == 'toy'; print(toy.__file__)"
    return Path(run_python(code, cwd, site))


def test_wheel_has_every_module_under_its_import_name(checkout, wheel):
    expected = {path.relative_to(checkout) for path in checkout.glob("kd_d2/**/*.py")}
    for package in checkout.glob("projects/*/*/__init__.py"):
        folder = package.parent
        for path in folder.rglob("*.py"):
            expected.add(Path("kd_d2/projects", folder.name, path.relative_to(folder)))
    with zipfile.ZipFile(wheel) as archive:
        modules = {Path(name) for name in archive.namelist() if name.endswith(".py")}
    # A module that is missing here most likely lies in a folder without __init__.py.
    assert expected == modules
    assert Path("kd_d2/projects/toymethod/parts/__init__.py") in modules


def test_wheel_has_the_files_that_modules_read(checkout, wheel):
    ours = {
        path.relative_to(checkout).as_posix()
        for path in checkout.glob("kd_d2/**/*.*")
        if path.suffix in (".css", ".js")
    }
    with zipfile.ZipFile(wheel) as archive:
        assert ours and ours <= set(archive.namelist())


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert canonicalize_name(metadata["Name"]) == "kd-d2"
    assert metadata["Version"] == kd_d2.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    required = {Requirement(line).name for line in metadata.get_all("Requires-Dist")}
    assert "torch" in required
    # Not on PyPI under its own name: pip would fail, or install something else.
    assert "detectron2" not in required


def test_import_from_checkout(checkout):
    assert import_toy(checkout).is_relative_to(checkout / "projects" / "ToyMethod")


def test_import_from_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # Somebody else's folder of that name beside the installed package is none of ours.
    stranger = tmp_path / "site" / "projects" / "X" / "stranger"
    stranger.mkdir(parents=True)
    (stranger / "__init__.py").write_text("")
    found = import_toy(tmp_path, tmp_path / "site")
    assert found == tmp_path / "site/kd_d2/projects/toymethod/parts/__init__.py"
    code = "import kd_d2.projects as p; print(len(p.__path__))"
    assert run_python(code, tmp_path, tmp_path / "site") == "1"


def test_import_editable(checkout, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    # What "pip install --editable" does: build this wheel and unpack it.
    code = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(site)
    assert import_toy(tmp_path, site).is_relative_to(checkout / "projects" / "ToyMethod")

    # A project that is added later is found without another installation.
    later = checkout / "projects" / "Later" / "later"
    later.mkdir(parents=True)
    (later / "__init__.py").write_text("")
    try:
        run_python("import kd_d2.projects.later", tmp_path, site)
    finally:
        shutil.rmtree(later.parent)


def test_import_kd_d2_touches_nothing():
    code = """
import sys, json
seen = []
def note(event, arguments):
    if event.startswith(("socket.", "urllib.", "subprocess.")) or event in ("open", "os.mkdir"):
        seen.append([event, str(arguments[0])])
sys.addaudithook(note)
import kd_d2
print(json.dumps([seen, sorted(sys.modules)]))
"""
    seen, modules = json.loads(run_python(code, ROOT))
    heavy = {"torch", "torchvision", "detectron2", "numpy", "PIL", "sklearn", "kd_d2.data"}
    assert not heavy & set(modules)
    standard = (sysconfig.get_path("stdlib"), str(ROOT / "kd_d2" / "__"), sys.base_prefix)
    for event, argument in seen:
        assert event == "open" and argument.startswith(standard), (event, argument)


def test_every_requirement_has_one_tested_version():
    pins = {}
    for line in (ROOT / "requirements" / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line
            name, version = line.split("==")
            assert name not in pins, f"{name} is listed twice"
            pins[name] = version

    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    script = (ROOT / "tools" / "install_detectron2.py").read_text()
    lists.append(re.search(r"^REQUIREMENTS = \((.+?)\n\)", script, re.S | re.M).group(1))
    for text in lists:
        for line in text.splitlines():
            if not line.strip() or line.startswith("#"):
                continue
            requirement = Requirement(line.strip(' ",'))
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} but {version}"
