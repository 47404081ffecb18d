"""The page: one file without anything outside of it, readable without its script."""

import base64
import hashlib
from importlib import resources
from typing import Any, List, Sequence, Tuple

import yaml

import kd_d2
from kd_d2.config import get_cfg
from kd_d2.engine.main import import_components
from kd_d2.visualization.html import Html, element

from .chart import line_chart, run_classes
from .collect import Gallery, Report
from .panels import image_store, run_panel, truth_panel
from .series import MAX_POINTS, Chart, chart_groups
from .tables import (
    ap_tables,
    config_table,
    cost_table,
    data_heading,
    error_tables,
    missing_table,
    run_table,
)

__all__ = ["write_page"]

# nothing may be fetched, whatever names and texts of the runs say
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{}'"

Section = Tuple[str, str, List[Any]]  # id, heading, content


def write_page(report: Report, title: str, made: str = "") -> str:
    """Return the HTML of a report.

    Args:
        made: when and how, in small print.
    """
    sections = [
        ("runs", "Runs", [run_table(report)]),
        ("scores", "Average precision", _scores(report)),
        ("configs", "Configs", _configs(report)),
        ("curves", "Curves", _curves(report)),
        ("errors", "Types of errors", _errors(report)),
        ("cost", "Parameters, multiply-adds, latency", _cost(report)),
        ("detections", "Detections", _detections(report)),
        ("missing", "What is missing", _missing(report)),
    ]
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = _POLICY.format(f"sha256-{digest}")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(style)),
    )
    links = [element("a", heading, href=f"#{id_}") for id_, heading, _ in sections]
    body = element(
        "body",
        element("header", element("h1", title), element("p", made, class_="small")),
        element("nav", links, aria_label="sections"),
        element("main", [_section(*section) for section in sections]),
        element("footer", element("p", f"kd_d2 {kd_d2.__version__}", class_="small")),
        element("script", Html(script)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _section(id_: str, heading: str, content: Sequence[Any]) -> Html:
    return element("section", element("h2", heading), list(content), id=id_)


def _text(text: str) -> Html:
    return element("p", text)


def _none(report: Report, part: str) -> List[Any]:
    """In place of a section's content: for each run, why it is not there."""
    reasons = [line for run in report.runs for line in run.missing if line.part == part]
    lines = [element("li", f"{line.run}: {line.reason}") for line in reasons]
    return [_text("No run has any."), element("ul", lines) if lines else None]


def _baseline_text(report: Report) -> str:
    baseline = report.options.baseline
    if baseline is None or len(report.runs) < 2:
        return ""
    return f" In small print: the difference to {report.runs[baseline].title}."


def _scores(report: Report) -> List[Any]:
    tables = ap_tables(report)
    if not tables:
        return _none(report, "scores")
    text = "The last evaluation of each run; the best value of a row is bold. "
    text += "A dash: not logged, or no such object in the data set."
    parts: List[Any] = [_text(text + _baseline_text(report))]
    for heading, table in tables:
        parts += [element("h3", heading), table]
    return parts


def _configs(report: Report) -> List[Any]:
    known = [run for run in report.runs if run.config is not None]
    if not known:
        return _none(report, "config")
    defaults = None
    if len(known) == 1:
        import_components()
        defaults = yaml.safe_load(get_cfg().dump())
    table = config_table(report, defaults)
    if table is None:
        return [_text("The configs of all runs are equal, OUTPUT_DIR aside.")]
    what = "that differ from the defaults" if len(known) == 1 else "that are not equal in all runs"
    return [_text(f"Keys {what}; OUTPUT_DIR and VERSION are left out."), table]


def _curves(report: Report) -> List[Any]:
    groups = chart_groups(report.runs)
    if not groups:
        return _none(report, "curves")
    titles = [run.title for run in report.runs]
    parts: List[Any] = [
        _text(
            "As logged, one value for some iterations; more than "
            f"{MAX_POINTS} values of a curve are averaged in groups."
        ),
        _legend(titles),
    ]
    for group in groups:
        cards = [line_chart(c, titles, _dropped(report, c)) for c in group.charts]
        grid = element("div", cards, class_="cards")
        if group.folded:
            summary = element("summary", f"{group.title} ({len(cards)})")
            parts.append(element("details", summary, grid))
        else:
            parts += [element("h3", group.title), grid]
    return parts


def _legend(titles: Sequence[str]) -> Html:
    entries = []
    for i, title in enumerate(titles):
        line = element("line", x1=0, x2=18, y1=5, y2=5)
        swatch = element("svg", line, class_=f"swatch {run_classes(i)}", viewBox="0 0 18 10")
        box = element("input", type="checkbox", checked=True, hidden=True, data_toggle=i)
        entries.append(element("label", box, swatch, element("span", title)))
    return element("div", entries, class_="legend")


def _dropped(report: Report, chart: Chart) -> str:
    """Which runs logged values that cannot be drawn."""
    lost = [
        (run.title, run.dropped[chart.title]) for run in report.runs if chart.title in run.dropped
    ]
    return "; ".join(f"{title}: {count} values are not finite" for title, count in lost)


def _errors(report: Report) -> List[Any]:
    tables = error_tables(report)
    if not tables:
        return _none(report, "errors")
    text = (
        "AP points that mending all errors of one type alone would gain (TIDE); means over the "
        "IoUs, the lowest value of a row is bold. They do not add up: errors hide each other."
    )
    parts: List[Any] = [_text(text + _baseline_text(report))]
    for heading, table in tables:
        parts += [element("h3", heading), table]
    return parts


def _cost(report: Report) -> List[Any]:
    table = cost_table(report)
    if table is None:
        return _none(report, "cost")
    text = "Of the network as it is deployed; the lowest value of a row is bold."
    return [_text(text + _baseline_text(report)), table]


def _detections(report: Report) -> List[Any]:
    if report.options.images < 1:
        return [_text("Left out, because no images were asked for.")]
    if not report.galleries:
        return _none(report, "detections")
    threshold = report.options.threshold
    slider = element(
        "input",
        type="range",
        min=0.05,
        max=0.95,
        step=0.01,
        value=threshold,
        id="threshold",
        aria_label="lowest score that is shown",
    )
    control = element(
        "p",
        "Lowest score that is shown: ",
        element("output", f"{threshold:.2f}", id="threshold-value"),
        element("span", slider, hidden=True, class_="control"),
        class_="threshold",
    )
    key = element(
        "p",
        [
            [element("span", text, class_=f"key {kind}"), " "]
            for kind, text in (
                ("right", "found: class is right, IoU at least 0.5"),
                ("wrong", "wrong"),
                ("missed", "missed object"),
                ("crowd", "in a crowd region, not judged"),
                ("truth", "ground truth"),
            )
        ],
    )
    parts: List[Any] = [control, key]
    for number, gallery in enumerate(report.galleries):
        parts += _gallery(report, gallery, f"image-{number}-")
    return parts


def _gallery(report: Report, gallery: Gallery, prefix: str) -> List[Any]:
    parts: List[Any] = [
        element("h3", data_heading(report, gallery.columns[0][0], gallery.data.name)),
        image_store(gallery.pictures, prefix),
    ]
    for i, picture in enumerate(gallery.pictures):
        image, classes = f"{prefix}{i}", gallery.data.classes
        panels = [truth_panel(picture, image, classes)]
        for index, detections in gallery.columns:
            title = report.runs[index].title
            threshold = report.options.threshold
            panels.append(run_panel(picture, image, classes, title, detections[i], threshold))
        parts.append(element("div", panels, class_="panels"))
    return parts


def _missing(report: Report) -> List[Any]:
    table = missing_table(report)
    return [_text("Nothing.")] if table is None else [table]
