"""Average precision of runs, as their evaluations logged it or from their predictions."""

import contextlib
import io
import math
import re
from dataclasses import dataclass
from typing import Dict, Iterable, List, Mapping, Optional, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .run import METRICS, RESULT, Run

__all__ = ["Evaluation", "box_scores", "logged_evaluations", "metric_order"]

MAIN = ("AP", "AP50", "AP75", "APs", "APm", "APl")

# an evaluation's name, if there are several, what was judged, and the metric
_LOGGED = re.compile(
    r"(?:(?P<name>.+)/)?(?P<task>(?:bbox|segm|keypoints)(?:_TTA)?)/(?P<metric>AP.*)"
)


@dataclass(frozen=True)
class Evaluation:
    """AP of a run on one data set.

    Attributes:
        dataset: name of the data set; empty if the run does not say.
        task: "bbox", "segm", ..., "bbox_TTA" with test-time augmentation; in front of it what
            tells several evaluations of a data set apart.
        metrics: "AP", "AP50", ..., "AP-<class>" -> percent; NaN where there are no objects.
        source: where the numbers come from.
    """

    dataset: str
    task: str
    metrics: Mapping[str, float]
    source: str


def logged_evaluations(run: Run) -> List[Evaluation]:
    """The last evaluation on every data set in metrics.json, or that in result.json."""
    latest: Dict[tuple, Dict[str, float]] = {}
    iterations: Dict[tuple, int] = {}
    for scalar, values in run.series.items():
        found = _LOGGED.fullmatch(scalar)
        if found is None:
            continue
        key = (found["name"] or "", found["task"])
        iteration, value = values[-1]
        if iteration > iterations.get(key, -1):
            latest[key], iterations[key] = {}, iteration
        if iteration == iterations[key]:
            latest[key][found["metric"]] = value
    for scalar in run.dropped:  # NaN: there are no such objects
        found = _LOGGED.fullmatch(scalar)
        if found is not None and (found["name"] or "", found["task"]) in latest:
            latest[found["name"] or "", found["task"]].setdefault(found["metric"], math.nan)
    result = []
    for (name, task), metrics in latest.items():
        dataset, label = _placed(name, task, run.test_sets)
        source = f"{METRICS}, iteration {iterations[name, task]}"
        result.append(Evaluation(dataset, label, metrics, source))
    stored = run.result.get("metrics")
    if not result and isinstance(stored, Mapping):
        metrics = {
            key: float(value)
            for key, value in stored.items()
            if key.startswith("AP") and isinstance(value, (int, float))
        }
        if metrics:
            result.append(Evaluation((run.test_sets or [""])[0], "bbox", metrics, RESULT))
    return result


def _placed(name: str, task: str, test_sets: Sequence[str]):
    """Data set and task of an evaluation that is logged under a name."""
    if name in test_sets:
        return name, task
    dataset = test_sets[0] if len(test_sets) == 1 else ""
    return dataset, f"{name}: {task}" if name else task


def metric_order(names: Iterable[str], classes: Sequence[str] = ()) -> List[str]:
    """AP first, then its variants, then the classes, in the order of the data set if known."""
    names = set(names)
    per_class = [f"AP-{c}" for c in classes if f"AP-{c}" in names]
    per_class += sorted(n for n in names if n.startswith("AP-") and n not in per_class)
    main = [n for n in MAIN if n in names]
    return [*main, *sorted(names - set(main) - set(per_class)), *per_class]


def box_scores(
    truth: COCO, predictions: Sequence[Mapping], class_names: Optional[Mapping[int, str]] = None
) -> Dict[str, float]:
    """COCO's metrics of boxes in percent, with "AP-<class>"; NaN where there are no objects.

    Args:
        predictions: COCO's result format, not empty.
        class_names: category id -> name; default: the names in ``truth``.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        boxes = [{k: v for k, v in p.items() if k != "segmentation"} for p in predictions]
        judged = COCOeval(truth, truth.loadRes(boxes), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    result = {name: _percent(value) for name, value in zip(MAIN, judged.stats)}
    names = class_names or {c["id"]: c["name"] for c in truth.loadCats(truth.getCatIds())}
    # (thresholds, recalls, classes, areas, numbers of detections)
    precision = judged.eval["precision"][:, :, :, 0, -1]
    for index, category in enumerate(judged.params.catIds):
        values = precision[:, :, index]
        values = values[values > -1]
        result[f"AP-{names[category]}"] = 100 * float(np.mean(values)) if len(values) else math.nan
    return result


def _percent(value: float) -> float:
    return 100 * float(value) if value >= 0 else math.nan
