"""The documentation as a site: it builds without a warning, and says what the code says."""

import importlib.util
import pkgutil
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

import kd_d2
import kd_d2.projects
from tests.documents import ROOT

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def extension():
    path = DOCS / "_ext" / "repository_pages.py"
    spec = importlib.util.spec_from_file_location("repository_pages", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_site(tmp_path):
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q", "-b"]
    command += ["html", "-d", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "html")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]

    def page(name):
        return (tmp_path / "html" / f"{name}.html").read_text()

    # generated: keys with meanings, what is unverified, blocks
    assert "KD.CROSSKD.POSITION" in page("methods/crosskd")
    assert page("methods/baselines").count("<h2>") >= 21
    assert "GTCells" in page("new_method")
    # docstrings, with sections
    assert 'id="kd_d2.distillation.Distiller.validate"' in page("api/distillation")
    assert re.search(r"Raises.*ValueError", page("api/checkpoint"), re.S)
    # links that leave the folder of the documentation
    assert "_generated/readme/jointdetnas.html#micro" not in page("results/mimicdet")
    assert "_generated/readme/jointdetnas.html" in page("results/joint-detnas")
    assert "comparison.png" in page("results/crosskd_comparison")
    assert "training_step.svg" in page("concepts")


def test_every_public_package_is_in_the_reference(extension, monkeypatch, tmp_path):
    documented = set()
    for path in (DOCS / "api").glob("*.md"):
        documented |= set(re.findall(r"automodule:: (\S+)", path.read_text()))
    for module in pkgutil.iter_modules(kd_d2.projects.__path__, "kd_d2.projects."):
        if module.ispkg:
            assert module.name in documented
    losses = pkgutil.iter_modules([str(ROOT / "kd_d2" / "losses")], "kd_d2.losses.")
    assert {module.name for module in losses} <= documented

    # what no page names is on the generated one
    others = set(re.findall(r"automodule:: (\S+)", extension.other_packages()))
    for module in pkgutil.iter_modules(kd_d2.__path__, "kd_d2."):
        inside = {name for name in documented if f"{name}.".startswith(f"{module.name}.")}
        assert bool(inside) != (module.name in others) or module.name == "kd_d2.projects"
    (tmp_path / "api").mkdir()
    monkeypatch.setattr(extension, "DOCS", tmp_path)
    assert "automodule:: kd_d2.blocks\n" in extension.other_packages()


def test_links_as_seen_from_another_folder(extension):
    project = ROOT / "projects" / "CrossKD"
    text = (
        "[a](configs/COCO/gfl_r18_r50_1x.yaml) [b](../DICOD/README.md#students) [c](configs/COCO) "
        "[d](https://example.org/x) ![e](images/l1_curves.png)"
    )
    page = DOCS / "_generated" / "readme"
    assert extension.rewrite_links(text, project, page) == (
        "[a](../../../projects/CrossKD/configs/COCO/gfl_r18_r50_1x.yaml) [b](dicod.md#students) c "
        "[d](https://example.org/x) ![e](../../../projects/CrossKD/images/l1_curves.png)"
    )


def test_readme_pages_are_all(extension):
    folders = {path.parent for path in ROOT.glob("projects/*/README.md")}
    assert {ROOT / folder for folder in extension.READMES.values()} == {
        *folders,
        ROOT / "benchmarks",
    }


def test_picture_is_readable_in_both_schemes():
    """Every colour of the light scheme has another one in the dark scheme."""
    picture = DOCS / "training_step.svg"
    root = ElementTree.parse(picture).getroot()
    style = root.find("{http://www.w3.org/2000/svg}style").text
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    coloured = r"([.\w-]+) \{[^}]*#[0-9a-f]{6}"
    assert set(re.findall(coloured, light)) == set(re.findall(coloured, dark))
    assert not set(re.findall("#[0-9a-f]{6}", light)) & set(re.findall("#[0-9a-f]{6}", dark))
