"""The page in real browsers: it renders, fits, answers the reader, and asks nobody for anything."""

import pytest

from kd_d2.report import Options, collect, read_runs, write_page
from tests.report.browsers import browsers, visit
from tests.report.test_run import write_run

WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """The two trained runs and eight more without anything but a log, with long names."""
    root = tmp_path_factory.mktemp("page")
    others = [
        write_run(
            root / f"a_run_whose_name_is_much_longer_than_any_column_should_be_{i}",
            f"SEED: {i}\nDATASETS:\n  TEST: ['d']\nX: {'y' * 300}{i}\n",
            [{"iteration": k, "loss_gfl_cls": 1.0 + i * k, "bbox/AP": i + 1.0} for k in (9, 19)],
        )
        for i in range(8)
    ]
    runs = read_runs([*map(str, trained), *map(str, others)])
    text = write_page(collect(runs, Options(0, 2, 0.1)), "Ten runs", "made now")
    (root / "report.html").write_text(text)
    return root / "report.html"


@pytest.fixture(scope="module", params=browsers(), ids=lambda path: path.rsplit("/", 1)[-1])
def seen(request, page, tmp_path_factory):
    return visit(request.param, page, WIDTHS, tmp_path_factory.mktemp("browser"))


@pytest.fixture(params=WIDTHS)
def facts(request, seen):
    (found,) = [facts for facts in seen.facts if facts["width"] == request.param]
    return found


def test_it_is_a_browser(facts):
    assert "Chrome/" in facts["agent"] and facts["window"] == facts["width"]


def test_no_errors_and_no_requests(seen):
    assert seen.console == []
    for facts in seen.facts:
        assert facts["requests"] == [] and facts["problems"] == []


def test_requests_and_foreign_scripts_would_be_found(page, tmp_path):
    evil = '<img src="http://example.com/x.png"><script>nothing()</script></body>'
    (tmp_path / "bad.html").write_text(page.read_text().replace("</body>", evil))
    (facts,) = visit("kaleido", tmp_path / "bad.html", [400], tmp_path).facts
    assert any("http://example.com/x.png" in problem for problem in facts["problems"])
    # the script did not run: it would have failed
    assert not any("nothing" in problem for problem in facts["problems"])


def test_nothing_is_wider_than_the_window(facts):
    assert facts["overflowing"] == []
    assert facts["scrollWidth"] <= facts["width"]


def test_everything_is_there(facts):
    shown = dict(facts["sections"])
    assert list(shown) == [
        *("runs", "scores", "configs", "curves", "errors", "cost", "detections", "missing")
    ]
    assert all(shown.values()) and facts["charts"] > 8 and facts["textSize"] >= 15
    assert facts["panels"] == facts["pictures"] == 2 * 3


def test_headings_stay_in_sight(facts):
    top, left = facts["sticky"]
    assert 0 <= top <= 2 and 0 <= left <= 2


def test_curves_are_switched(facts):
    assert facts["toggles"] == 10 and facts["toggled"] == [False, True]


def test_values_under_the_pointer(facts):
    last = max(x for curve in facts["curves"] for x in curve["x"])
    assert facts["tip"].startswith(f"iteration {last}") and facts["tipGone"] and facts["tipInside"]
    ends = {curve["run"]: curve["y"][-1] for curve in facts["curves"] if curve["x"][-1] == last}
    assert ends
    for value in ends.values():
        assert f"{value}" in facts["tip"]


def test_threshold_of_scores(facts):
    start, all_of_them, none = facts["slider"]
    # the script counts as the program did
    assert all_of_them[:1] == ["0.05"] and none[:1] == ["0.95"]
    assert all_of_them[1] >= start[1] >= none[1] and all_of_them[1] > none[1]
    assert all_of_them[2] <= start[2] <= none[2]
    assert none[3].endswith(" 2 missed") or none[1] > 0
