"""What the doctor says of an environment, also of a broken one."""

import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

import detectron2
import pytest
import torch

import kd_d2
from kd_d2.doctor import environment
from kd_d2.doctor.__main__ import main


def facts():
    return {fact.name: fact for fact in environment.describe_environment()}


def test_versions_and_places():
    found = facts()
    assert not any(fact.broken for fact in found.values())
    assert found["torch"].text.startswith(torch.__version__)
    assert found["detectron2"].text.startswith(f"{detectron2.__version__} (")
    assert str(Path(kd_d2.__file__).parent) in found["kd_d2"].text
    assert kd_d2.__version__ in found["kd_d2"].text and "a checkout" in found["kd_d2"].text
    assert sys.executable in found["python"].text


def installed(folder, **files):
    """A module detectron2 and its distribution in ``folder``; return the module's file."""
    package, info = folder / "detectron2", folder / "detectron2-0.6.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.6'\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n")
    for name, text in files.items():
        (info / name.replace("_txt", ".txt").replace("_json", ".json")).write_text(text)
    return str(package / "__init__.py")


@pytest.mark.parametrize(
    "files, said",
    [
        ({"PROVENANCE_txt": "repackaged"}, "repackaged copy that tools/install_detectron2.py"),
        (
            {"direct_url_json": '{"url": "file:///src/detectron2", "dir_info": {}}'},
            r"a build of its own repository \(file:///src/detectron2\)",
        ),
        ({}, "a build of its own repository$"),
    ],
)
def test_origin_of_detectron2(files, said, tmp_path, monkeypatch):
    file = installed(tmp_path, **files)
    distribution = importlib.metadata.PathDistribution(tmp_path / "detectron2-0.6.dist-info")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    monkeypatch.setattr(detectron2, "__file__", file)
    assert re.search(said, environment.detectron2_origin())
    # another one is imported than is installed
    elsewhere = tmp_path / "checkout" / "detectron2"
    elsewhere.mkdir(parents=True)
    (elsewhere / "__init__.py").touch()
    monkeypatch.setattr(detectron2, "__file__", str(elsewhere / "__init__.py"))
    assert environment.detectron2_origin() == "not installed, imported from this folder"


def test_editable_detectron2_is_a_build_of_its_repository(tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "detectron2").mkdir(parents=True)
    info = tmp_path / "site" / "detectron2-0.6.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: detectron2\nVersion: 0.6\n")
    (info / "direct_url.json").write_text(f'{{"url": "file://{source}"}}')
    distribution = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    monkeypatch.setattr(detectron2, "__file__", str(source / "detectron2" / "__init__.py"))
    said = environment.detectron2_origin()
    assert said == f"a build of its own repository (file://{source})"


def test_missing_detectron2_is_said_and_ends_with_1(monkeypatch, capsys):
    import_module = importlib.import_module

    def without_detectron2(name, *args):
        if name == "detectron2":
            raise ModuleNotFoundError("No module named 'detectron2'")
        return import_module(name, *args)

    monkeypatch.setattr(importlib, "import_module", without_detectron2)
    assert main([]) == 1
    captured = capsys.readouterr()
    assert "CANNOT BE IMPORTED (ModuleNotFoundError" in captured.out
    assert "python tools/install_detectron2.py" in captured.out
    assert captured.err == "doctor: error: detectron2 cannot be imported, see above\n"


def test_missing_optional_package_says_how_to_get_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "cv2" else find_spec(name)
    )
    text = facts()["optional"].text
    assert "pip install opencv-python-headless" in text and "scikit-learn MISSING" not in text
