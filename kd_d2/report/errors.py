"""Error types (TIDE) of runs, as logged or from their predictions."""

import functools
import json
from dataclasses import dataclass
from typing import Dict, Optional, Tuple

from tqdm import tqdm

from kd_d2.evaluation.tide import COCO_THRESHOLDS, ERROR_TYPES, TideResult, tide_errors

from .run import METRICS, PREDICTIONS, Run
from .truth import TestData, read_predictions

__all__ = ["Errors", "computed_errors", "logged_errors"]

# beside the predictions
_STORED = PREDICTIONS.replace("coco_instances_results", "coco_tide")


@dataclass(frozen=True)
class Errors:
    """AP points that mending all errors of one type would gain.

    Attributes:
        mean: type -> mean over the thresholds.
        at_half: type -> at IoU 0.5; empty if that is not among the thresholds.
        thresholds: foreground IoUs; empty if not known.
        source: where the numbers come from.
    """

    mean: Dict[str, float]
    at_half: Dict[str, float]
    thresholds: Tuple[float, ...]
    source: str

    @classmethod
    def of(cls, result: TideResult, source: str) -> "Errors":
        values = result.metrics()
        half = {t: values[f"{t}-50"] for t in ERROR_TYPES if f"{t}-50" in values}
        return cls({t: values[t] for t in ERROR_TYPES}, half, tuple(result.thresholds), source)


def logged_errors(run: Run) -> Optional[Errors]:
    """What TEST.TIDE of the run's last evaluation wrote; None if there is nothing."""
    try:
        with open(run.path(_STORED), encoding="utf-8") as f:
            stored = json.load(f)
        result = TideResult(**{k: stored[k] for k in ("thresholds", "ap", "errors", "counts")})
        return Errors.of(result, _STORED)
    except FileNotFoundError:
        pass
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        run.lacks("errors", f"{_STORED} cannot be read ({error or type(error).__name__})")
    last = {name: values[-1][1] for name, values in run.series.items()}
    mean = {t: last[f"tide/{t}"] for t in ERROR_TYPES if f"tide/{t}" in last}
    half = {t: last[f"tide/{t}-50"] for t in ERROR_TYPES if f"tide/{t}-50" in last}
    return Errors(mean, half, (), METRICS) if len(mean) == len(ERROR_TYPES) else None


def computed_errors(run: Run, data: TestData) -> Errors:
    """The same from stored predictions, at COCO's thresholds.

    Raises:
        FileNotFoundError: there are no predictions, or no ground truth in COCO's format.
        ValueError: they do not fit.
    """
    predictions = read_predictions(run)
    bar = functools.partial(tqdm, desc=f"errors of {run.title}", unit="image")
    result = tide_errors(data.coco, predictions, COCO_THRESHOLDS, progress=bar)
    return Errors.of(result, f"computed here from {PREDICTIONS}")
