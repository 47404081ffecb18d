"""What a training or evaluation left in its folder."""

import functools
import glob
import json
import math
import os
import textwrap
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.config import CfgNode

from kd_d2.checkpoint import read_config_file
from kd_d2.engine.main import build_config
from kd_d2.visualization.curves import read_metrics

__all__ = ["CONFIG", "METRICS", "Missing", "PREDICTIONS", "Run", "read_runs"]

CONFIG, METRICS, RESULT = "config.yaml", "metrics.json", "result.json"
PREDICTIONS = os.path.join("inference", "coco_instances_results.json")
WEIGHTS = "model_final.pth"

Series = Dict[str, List[Tuple[int, float]]]


@dataclass(frozen=True)
class Missing:
    """Something of a run that cannot be shown.

    Attributes:
        run: title of the run.
        part: what, e.g. "curves".
        reason: why.
    """

    run: str
    part: str
    reason: str


@dataclass
class Run:
    """A folder of results. What is not in it is empty here and listed in ``missing``.

    Attributes:
        title: short name, different for every run.
        folder: as the user named it.
        config: content of config.yaml; None without one.
        series: scalar -> [(iteration, value), ...] from metrics.json, finite numbers only.
        dropped: scalar -> how many of its values were no finite numbers.
        result: content of result.json, which the library's own experiments write.
    """

    title: str
    folder: str
    config: Optional[Mapping[str, Any]] = None
    series: Series = field(default_factory=dict)
    dropped: Dict[str, int] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    missing: List[Missing] = field(default_factory=list)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def lacks(self, part: str, reason: Any) -> None:
        """Note, once, that a part cannot be shown; a long reason is cut."""
        entry = Missing(self.title, part, textwrap.shorten(str(reason), 400, placeholder=" ..."))
        if entry not in self.missing:
            self.missing.append(entry)

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a dotted key of the stored config, whatever program wrote it."""
        node: Any = self.config or {}
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    @functools.cached_property
    def cfg(self) -> CfgNode:
        """The config, known keys only, as programs of this library read it.

        Raises:
            ValueError, FileNotFoundError: there is none or it does not fit the installed version.
        """
        if self.config is None:
            raise FileNotFoundError(f"there is no {CONFIG}")
        return build_config(self.path(CONFIG))

    @property
    def test_sets(self) -> List[str]:
        """DATASETS.TEST, where predictions are of the last one."""
        names = self.get("DATASETS.TEST") or []
        return [names] if isinstance(names, str) else [str(name) for name in names]

    @property
    def last_iteration(self) -> Optional[int]:
        """Number of iterations that the log knows of."""
        trained = [values[-1][0] for name, values in self.series.items() if "loss" in name]
        return max(trained) + 1 if trained else None

    @property
    def checkpoint(self) -> Optional[str]:
        """The final weights, else the last ones; None if there are none."""
        if os.path.isfile(self.path(WEIGHTS)):
            return self.path(WEIGHTS)
        tag = self.path("last_checkpoint")
        if not os.path.isfile(tag):
            return None
        with open(tag, encoding="utf-8", errors="replace") as f:
            path = self.path(os.path.basename(f.read().strip()))
        return path if os.path.isfile(path) else None


def read_runs(folders: Sequence[str], titles: Optional[Sequence[str]] = None) -> List[Run]:
    """Read every folder.

    Args:
        folders: of runs of train_net.py, of the benchmarks or of a project.
        titles: short names in the same order; default: the shortest ends of the paths that differ.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: one is no run, or appears twice, or titles are not different.
    """
    places = [os.path.realpath(folder) for folder in folders]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise ValueError(f"{folders[i]} is named twice; give every run once")
    if titles is not None and len(set(titles)) < len(folders):
        raise ValueError(f"{len(folders)} runs need as many different titles, got {list(titles)}")
    return [_read(*pair) for pair in zip(folders, titles or short_titles(places))]


def short_titles(paths: Sequence[str]) -> List[str]:
    """The last parts of different paths, as few as tell them apart."""
    result = []
    for path in paths:
        parts = path.strip(os.sep).split(os.sep)
        for count in range(1, len(parts) + 1):
            end = os.sep + os.sep.join(parts[-count:])
            if sum((os.sep + p.strip(os.sep)).endswith(end) for p in paths) == 1:
                break
        result.append(end[1:])
    return result


def _read(folder: str, title: str) -> Run:
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is no folder; give the OUTPUT_DIR of a run")
    known = [name for name in (CONFIG, METRICS, PREDICTIONS) if os.path.isfile(_in(folder, name))]
    if not known:
        raise ValueError(
            f"{folder} is not the folder of a run: it has neither {CONFIG} nor {METRICS} nor "
            f"{PREDICTIONS}{_hint(folder)}"
        )
    run = Run(title, folder)
    try:
        run.config = read_config_file(run.path(CONFIG))
    except (ValueError, OSError) as error:
        run.lacks("config", _reason(CONFIG, run, error))
    try:
        run.series, run.dropped = _finite(read_metrics(run.path(METRICS)))
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        run.lacks("curves", _reason(METRICS, run, error))
    if os.path.isfile(run.path(RESULT)):
        try:
            with open(run.path(RESULT), encoding="utf-8") as f:
                run.result = dict(json.load(f))
        except (TypeError, ValueError) as error:
            run.lacks("result", _reason(RESULT, run, error))
    return run


def _in(folder: str, name: str) -> str:
    return os.path.join(folder, name)


def _reason(name: str, run: Run, error: Exception) -> str:
    if not os.path.isfile(run.path(name)):
        return f"there is no {name}"
    return f"{name} cannot be read ({error or type(error).__name__})"


def _hint(folder: str) -> str:
    """Runs that lie below a folder that is none itself."""
    pattern = os.path.join(glob.escape(folder), *["*"])
    found = sorted(
        {
            os.path.dirname(path)
            for depth in (pattern, os.path.join(pattern, "*"))
            for name in (CONFIG, METRICS)
            for path in glob.glob(os.path.join(depth, name))
        }
    )
    if not found:
        return ""
    shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    return f"; but there are {len(found)} runs below it, give these: {shown}"


def _finite(series: Mapping[str, Sequence[Tuple[int, Any]]]) -> Tuple[Series, Dict[str, int]]:
    kept: Series = {}
    dropped: Dict[str, int] = {}
    for name, values in series.items():
        good = [(int(i), float(v)) for i, v in values if _is_finite(v)]
        if good:
            kept[name] = good
        if len(good) < len(values):
            dropped[name] = len(values) - len(good)
    return kept, dropped


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
