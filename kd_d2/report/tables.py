"""Tables of a page: a row per quantity, a column per run."""

import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from kd_d2.visualization.html import Html, element, html_table

from .chart import run_classes
from .collect import Report
from .config_diff import ABSENT, differences, group_of
from .errors import Errors
from .run import Run
from .scores import Evaluation, metric_order

__all__ = [
    "ap_tables",
    "best_of",
    "config_table",
    "cost_table",
    "data_heading",
    "error_tables",
    "missing_table",
    "run_table",
    "scrolling",
]

NOTHING = "–"

_METRICS = {
    "AP": "AP, mean over IoU 0.50 to 0.95",
    "AP50": "AP50, IoU 0.50",
    "AP75": "AP75, IoU 0.75",
    "APs": "APs, objects below 32² pixels",
    "APm": "APm, from 32² to 96²",
    "APl": "APl, above 96²",
}
_ERRORS = {
    "Cls": "Cls: wrong class",
    "Loc": "Loc: bad box",
    "Both": "Both: class and box",
    "Dupe": "Dupe: second detection of an object",
    "Bkg": "Bkg: nothing there",
    "Miss": "Miss: object that nothing found",
}


def scrolling(table: Html) -> Html:
    """A table that scrolls inside of its own frame; reachable with the keyboard."""
    return element("div", table, class_="scroll", tabindex=0)


def run_heading(index: int, title: str, baseline: Optional[int]) -> Html:
    """Column heading of a run, with its colour."""
    note = element("span", "baseline", class_="badge") if index == baseline else None
    return element("th", _swatch(index), title, " ", note, scope="col")


def _swatch(index: int) -> Html:
    line = element("line", x1=0, x2=18, y1=5, y2=5)
    return element(
        "svg", line, class_=f"swatch {run_classes(index)}", viewBox="0 0 18 10", aria_hidden="true"
    )


def best_of(values: Sequence[Optional[float]], highest: bool = True) -> List[int]:
    """Indices of the best of at least two values, equal to two decimals as they are shown."""
    known = [round(v, 2) for v in values if v is not None]
    if len(known) < 2 or min(known) == max(known):
        return []
    best = max(known) if highest else min(known)
    return [i for i, v in enumerate(values) if v is not None and round(v, 2) == best]


def number_row(
    label: Any,
    values: Sequence[Optional[float]],
    baseline: Optional[int],
    highest: bool = True,
    digits: int = 2,
) -> List[Any]:
    """A row of numbers: the best one marked, differences to the baseline in small print."""
    known = [v if v is not None and math.isfinite(v) else None for v in values]
    best = best_of(known, highest)
    reference = known[baseline] if baseline is not None else None
    row: List[Any] = [label]
    for i, value in enumerate(known):
        if value is None:
            row.append(element("td", NOTHING, class_="number"))
            continue
        shown = f"{value:.{digits}f}"
        content: List[Any] = [element("strong", shown, title="best") if i in best else shown]
        if reference is not None and i != baseline:
            change = round(value - reference, digits)
            better = _direction(change, highest) if change else ""
            text = f"{change:+.{digits}f}" if change else f"±{0:.{digits}f}"
            content += [" ", element("span", text, class_=f"change {better}".strip())]
        row.append(element("td", content, class_="number best" if i in best else "number"))
    return row


def _direction(change: float, highest: bool) -> str:
    return "better" if (change > 0) == highest else "worse"


def _header(report: Report, columns: Sequence[int], first: str, baseline: Optional[int]):
    return [
        element("th", first, scope="col"),
        *(run_heading(i, report.runs[i].title, baseline) for i in columns),
    ]


# ----------------------------------------------------------------------------------------- AP
def ap_tables(report: Report) -> List[Tuple[str, Html]]:
    """(heading, table) for every data set and kind of evaluation."""
    tables: Dict[tuple, Dict[int, Evaluation]] = {}
    classes: Dict[tuple, Sequence[str]] = {}
    for i, evaluations in enumerate(report.evaluations):
        for evaluation in evaluations:
            data = report.test_data[i].get(evaluation.dataset)
            key = (data_heading(report, i, evaluation.dataset), evaluation.task)
            tables.setdefault(key, {})[i] = evaluation
            if data:
                classes[key] = data.classes
    return [
        (f"{task}, {data}", _ap_table(report, own, classes.get((data, task), ())))
        for (data, task), own in tables.items()
    ]


def data_heading(report: Report, index: int, name: str) -> str:
    """Name of a run's data set, with its files if other runs have others under this name."""
    places = {known[name].identity for known in report.test_data if name in known}
    data = report.test_data[index].get(name)
    if len(places) > 1:
        return f"{name} ({data.identity if data else 'its files were not found'})"
    return name or "unknown data set"


def _ap_table(report: Report, own: Mapping[int, Evaluation], classes: Sequence[str]) -> Html:
    columns = sorted(own)
    baseline = report.options.baseline
    position = columns.index(baseline) if baseline in own else None
    names = metric_order({n for e in own.values() for n in e.metrics}, classes)
    rows: List[List[Any]] = []
    for name in names:
        if name.startswith("AP-") and (not rows or not rows[-1][0].startswith("class ")):
            rows.append([element("span", "AP of single classes")])
        label = f"class {name[3:]}" if name.startswith("AP-") else _METRICS.get(name, name)
        rows.append(number_row(label, [own[i].metrics.get(name) for i in columns], position))
    rows.append(["source", *(element("td", own[i].source, class_="small wrap") for i in columns)])
    return scrolling(html_table(_header(report, columns, "percent", baseline), rows))


# ------------------------------------------------------------------------------------- errors
def error_tables(report: Report) -> List[Tuple[str, Html]]:
    """(heading, table) for every data set: AP points that each type of error costs."""
    tables: Dict[str, Dict[int, Errors]] = {}
    for i, errors in enumerate(report.errors):
        if errors is not None:
            name = (report.runs[i].test_sets or [""])[-1]
            tables.setdefault(data_heading(report, i, name), {})[i] = errors
    return [(heading, _error_table(report, own)) for heading, own in tables.items()]


def _error_table(report: Report, by_run: Mapping[int, Errors]) -> Html:
    columns, own = sorted(by_run), [by_run[i] for i in sorted(by_run)]
    baseline = report.options.baseline
    position = columns.index(baseline) if baseline in columns else None
    rows: List[List[Any]] = []
    for name, label in _ERRORS.items():
        values = [errors.mean[name] for errors in own]
        rows.append(number_row(label, values, position, highest=False))
    if any(errors.at_half for errors in own):
        rows.append(["at IoU 0.50"])
        for name, label in _ERRORS.items():
            found = [errors.at_half.get(name) for errors in own]
            rows.append(number_row(label, found, position, highest=False))
    ranges = [element("td", _range(e.thresholds), class_="small wrap") for e in own]
    sources = [element("td", e.source, class_="small wrap") for e in own]
    rows += [["IoUs of the means", *ranges], ["source", *sources]]
    return scrolling(html_table(_header(report, columns, "AP points", baseline), rows))


def _range(thresholds: Sequence[float]) -> str:
    if not thresholds:
        return "as TEST.TIDE.THRESHOLDS"
    if len(thresholds) < 4:
        return ", ".join(f"{t:g}" for t in thresholds)
    return f"{len(thresholds)} from {thresholds[0]:g} to {thresholds[-1]:g}"


# --------------------------------------------------------------------------------------- cost
def cost_table(report: Report) -> Optional[Html]:
    """Parameters, FLOPs and latency; None if nothing of it is known."""
    columns = [i for i, cost in enumerate(report.costs) if cost is not None]
    if not columns:
        return None
    costs = [cost for cost in report.costs if cost is not None]
    baseline = report.options.baseline
    position = columns.index(baseline) if baseline in columns else None
    labels = list(dict.fromkeys(label for cost in costs for label in cost.figures))
    rows = [
        number_row(label, [cost.figures.get(label) for cost in costs], position, highest=False)
        for label in labels
    ]
    rows.append(["how", *(element("td", cost.note, class_="small wrap") for cost in costs)])
    return scrolling(html_table(_header(report, columns, "", baseline), rows))


# ------------------------------------------------------------------------------------ configs
def config_table(report: Report, defaults: Optional[Mapping[str, Any]]) -> Optional[Html]:
    """Keys in which the runs differ; of a single run those that differ from the defaults.

    Args:
        defaults: config without any file, for a single run.
    """
    columns = [i for i, run in enumerate(report.runs) if run.config is not None]
    configs = [report.runs[i].config for i in columns]
    baseline = report.options.baseline
    header = _header(report, columns, "key", baseline)
    position = columns.index(baseline) if baseline in columns else None
    if len(configs) == 1 and defaults is not None:
        configs, position = [defaults, *configs], 0
        header = [header[0], element("th", "default", scope="col"), header[1]]
    found = differences(configs) if len(configs) > 1 else []
    if not found:
        return None
    rows: List[List[Any]] = []
    group = ""
    for key, values in found:
        if group_of(key) != group:
            group = group_of(key)
            rows.append([group])
        short = key[len(group) + 1 :] or key
        cells = [_value(v, position is not None and v != values[position]) for v in values]
        rows.append([element("code", short, title=key), *cells])
    return scrolling(html_table(header, rows, class_="config"))


def _value(value: Any, changed: bool) -> Html:
    if value is ABSENT:
        return element("td", "not in this config", class_="small")
    text = repr(value) if value != "" else "''"
    return element("td", element("code", text), class_="changed wrap" if changed else "wrap")


# ----------------------------------------------------------------------------------- overview
def run_table(report: Report) -> Html:
    """What each run is."""
    rows: List[List[Any]] = [["folder", *(_code(run.folder) for run in report.runs)]]
    facts: Dict[str, Any] = {
        "detector": lambda run: run.get("MODEL.META_ARCHITECTURE"),
        "distilled by": _methods,
        "teacher's weights": lambda run: _if_distilled(run, "KD.TEACHER.WEIGHTS"),
        "trained on": lambda run: _listed(run.get("DATASETS.TRAIN")),
        "seed": lambda run: run.get("SEED"),
        "iterations": _iterations,
        "training and evaluation, seconds": _seconds,
        "seconds an iteration (median logged)": _seconds_per_iteration,
        "versions": _versions,
    }
    for label, fact in facts.items():
        values = [fact(run) for run in report.runs]
        if any(value not in (None, "") for value in values):
            cells = [NOTHING if value in (None, "") else str(value) for value in values]
            rows.append([label, *(element("td", cell, class_="wrap") for cell in cells)])
    columns = range(len(report.runs))
    return scrolling(html_table(_header(report, columns, "run", report.options.baseline), rows))


def _code(text: str) -> Html:
    return element("td", element("code", text), class_="wrap")


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")


def _methods(run: Run) -> Optional[str]:
    if run.get("KD.ENABLED") is None:
        return None
    return _listed(run.get("KD.DISTILLERS")) if run.get("KD.ENABLED") else "nothing"


def _if_distilled(run: Run, key: str) -> Any:
    return run.get(key) if run.get("KD.ENABLED") else None


def _iterations(run: Run) -> Optional[str]:
    done, planned = run.last_iteration, run.get("SOLVER.MAX_ITER")
    if done is None:
        return None
    return f"{done}" if done == planned or planned is None else f"{done} of {planned} logged"


def _seconds(run: Run) -> Optional[str]:
    seconds = run.result.get("seconds")
    if not isinstance(seconds, (int, float)):
        return None
    return f"{seconds:.0f}" + (" (since it was resumed)" if run.result.get("resumed") else "")


def _seconds_per_iteration(run: Run) -> Optional[str]:
    times = sorted(value for _, value in run.series.get("time", ()))
    return f"{times[len(times) // 2]:.3f}" if times else None


def _versions(run: Run) -> str:
    versions = run.result.get("versions")
    if not isinstance(versions, Mapping):
        return ""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def missing_table(report: Report) -> Optional[Html]:
    """What could not be shown, and why; None if nothing is missing."""
    lines = [line for run in report.runs for line in run.missing]
    if not lines:
        return None
    rows = [
        [line.run, element("td", line.part), element("td", line.reason, class_="wrap")]
        for line in lines
    ]
    return scrolling(html_table(["run", "part", "why it is not there"], rows))
