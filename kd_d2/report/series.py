"""Which logged scalars are drawn, in what order, and with how many points."""

import re
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

from kd_d2.visualization.curves import detection_loss

from .run import Run, Series

__all__ = ["Chart", "ChartGroup", "chart_groups", "thin"]

Points = List[Tuple[float, float]]
MAX_POINTS = 300

TOTAL = "detector's losses together"
# bookkeeping of the loop, and per-class or per-threshold values that have tables of their own
_LEFT_OUT = re.compile(
    r"(rank_)?data_time|time|eta_seconds|epoch|"
    r"(.+/)?(bbox|segm|keypoints)(_TTA)?/AP-.*|(.+/)?tide/.+-\d.*"
)


class Chart(NamedTuple):
    """One scalar of all runs that logged it.

    Attributes:
        curves: (index of the run, points).
    """

    title: str
    curves: List[Tuple[int, Points]]


class ChartGroup(NamedTuple):
    """Charts below one heading.

    Attributes:
        folded: the reader has to open it.
    """

    title: str
    charts: List[Chart]
    folded: bool = False


def _is_ap(name: str) -> bool:
    return re.fullmatch(r".*(^|/)AP[^/]*", name) is not None


def _starts(*prefixes: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefixes)


# a scalar belongs to the first group that wants it
_GROUPS: Sequence[Tuple[str, Callable[[str], bool]]] = (
    ("Accuracy", _is_ap),
    ("Distillation terms, weighted", _starts("loss_kd/")),
    ("Losses", lambda name: name in (TOTAL, "total_loss") or name.startswith("loss")),
    ("Distillation terms before their weights", _starts("kd_raw/")),
    ("Factors of the schedules", _starts("kd_factor/")),
    ("Gradients of the methods relative to the detector's", _starts("kd_grad_")),
    ("Learning rate", lambda name: name == "lr"),
    ("Other scalars", lambda name: True),
)
_ORDER = ("Accuracy", "Losses", *(title for title, _ in _GROUPS if title[0] in "DFGL"))


def chart_groups(runs: Sequence[Run]) -> List[ChartGroup]:
    """All charts; a group without any is left out."""
    logged: List[Series] = []
    for run in runs:
        series = {k: v for k, v in run.series.items() if not _LEFT_OUT.fullmatch(k)}
        total = detection_loss(run.series)
        logged.append({TOTAL: total, **series} if total else series)
    charts: Dict[str, List[Chart]] = {}
    for name in sorted(set().union(*logged), key=_rank):
        group = next(title for title, wants in _GROUPS if wants(name))
        curves = [(i, thin(series[name])) for i, series in enumerate(logged) if name in series]
        charts.setdefault(group, []).append(Chart(name, curves))
    titles = list(dict.fromkeys([*_ORDER, *(title for title, _ in _GROUPS)]))
    return [
        ChartGroup(title, charts[title], folded=title == "Other scalars")
        for title in titles
        if title in charts
    ]


def _rank(name: str) -> tuple:
    """Sums before their parts, AP before its variants, else by name."""
    return (name != TOTAL, name != "total_loss", name.rsplit("/", 1)[-1] != "AP", name)


def thin(values: Sequence[Tuple[int, float]], limit: int = MAX_POINTS) -> Points:
    """At most ``limit`` points: means, of iteration and value, over parts of equal size."""
    size = len(values)
    if size <= limit:
        return [(float(x), y) for x, y in values]
    result = []
    for i in range(limit):
        part = values[i * size // limit : (i + 1) * size // limit]
        result.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return result
