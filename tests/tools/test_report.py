"""The command that writes a page about runs."""

import importlib.util
import pathlib

import pytest

from tests.report.strict_html import check
from tests.report.test_run import write_run

TOOL = pathlib.Path(__file__).resolve().parents[2] / "tools" / "report.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("kd_d2_report", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path):
    """Folders of two runs that have nothing but a log."""
    values = {"a": 1.0, "b=c": 2.0}
    return [
        str(write_run(tmp_path / name, None, [{"iteration": 9, "loss_x": v, "bbox/AP": 10 * v}]))
        for name, v in values.items()
    ]


def test_page(tool, runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    tool.main([*runs, "--output", str(out), "--baseline", "b=c", "--title", "<T>"])
    tree = check(out.read_text())
    assert tree.all("h1")[0].text == "<T>"
    cells = [c.text for c in tree.by_id("scores").all("td")]
    assert cells[:2] == ["10.00 -10.00", "20.00"]
    printed = capsys.readouterr().out
    assert "a: no config: there is no config.yaml" in printed
    assert printed.splitlines()[-1].startswith(f"written: {out}")
    # the page says how it was made, so that it can be made again
    assert f"python tools/report.py {runs[0]}" in tree.all("header")[0].text


def test_titles(tool, runs, tmp_path):
    out = tmp_path / "page.html"
    tool.main([f"x={runs[0]}", f"y z={runs[1]}", "--output", str(out), "--baseline", "none"])
    tree = check(out.read_text())
    assert [th.text.strip() for th in tree.all("thead")[0].all("th")] == ["run", "x", "y z"]
    assert [c.text for c in tree.by_id("scores").all("td")][:2] == ["10.00", "20.00"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--baseline", "z"], "--baseline z is none of the runs"),
        (["--images", "-1"], "--images must not be negative"),
        (["--score-threshold", "30"], "--score-threshold must be from 0 to 1"),
        (["--image-size", "8", "8"], "--image-size must be at least 32 32"),
        (["--output", "/nowhere/x.html"], "--output /nowhere/x.html"),
        (["{tmp}"], "is not the folder of a run"),
        (["{tmp}/none"], "/none is no folder"),
        (["t={tmp}/a"], "give every run a title"),
    ],
)
def test_mistakes_end_with_one_sentence(tool, runs, tmp_path, more, message):
    arguments = [word.replace("{tmp}", str(tmp_path)) for word in more]
    if not arguments[0].startswith("--"):
        arguments += ["--output", str(tmp_path / "page.html")]
    with pytest.raises(SystemExit) as error:
        tool.main([*runs, *arguments])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()
