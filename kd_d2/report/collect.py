"""Everything that a page shows of runs, read or computed; what is missing is noted in the runs."""

import contextlib
import logging
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from .cost import Cost, CostOptions, network_of, timed
from .detections import Picture, chosen_pictures, detect, stored_detections
from .errors import Errors, computed_errors, logged_errors
from .matching import Box
from .run import PREDICTIONS, Run
from .scores import Evaluation, box_scores, logged_evaluations
from .truth import TestData, find_test_data, read_predictions

__all__ = ["Gallery", "Options", "Report", "collect"]

logger = logging.getLogger(__name__)

# What files of a run that are damaged, or of another version, raise while they are used. Whatever
# it is, the rest of the page is written.
_FAILURES = (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Options:
    """What is shown.

    Args:
        baseline: index of the run that differences refer to; None: no differences.
        images: pictures with detections.
        threshold: score of the detections that are shown at first.
        cost: of the networks.
    """

    baseline: Optional[int] = None
    images: int = 6
    threshold: float = 0.3
    cost: CostOptions = CostOptions()


@dataclass
class Gallery:
    """Pictures of a data set with the detections of the runs that were tested on it.

    Attributes:
        columns: (index of the run, detections of every picture).
    """

    data: TestData
    pictures: List[Picture]
    columns: List[Tuple[int, List[List[Box]]]] = field(default_factory=list)


@dataclass
class Report:
    """The content of a page; lists are parallel to ``runs``."""

    runs: List[Run]
    options: Options
    test_data: List[Dict[str, TestData]]
    evaluations: List[List[Evaluation]]
    errors: List[Optional[Errors]]
    costs: List[Optional[Cost]]
    galleries: List[Gallery]


def collect(runs: Sequence[Run], options: Options) -> Report:
    """Look at every run; what cannot be had is noted in ``run.missing``."""
    found: Dict[Tuple[str, str], TestData] = {}
    report = Report(list(runs), options, [], [], [], [], [])
    for run in runs:
        logger.info(f"{run.title}: test data, scores, errors")
        report.test_data.append(_test_data(run, found))
        judged = report.test_data[-1].get(run.test_sets[-1]) if run.test_sets else None
        report.evaluations.append(_evaluations(run, judged))
        report.errors.append(_errors(run, judged))
    report.costs = _costs(report)
    if options.images > 0:
        report.galleries = _galleries(report)
    return report


@contextlib.contextmanager
def _noted(run: Run, part: str) -> Iterator[None]:
    """Turn what goes wrong into a line about the run."""
    try:
        yield
    except _FAILURES as error:
        run.lacks(part, error.args[0] if isinstance(error, KeyError) else error)


def _test_data(run: Run, found: Dict[Tuple[str, str], TestData]) -> Dict[str, TestData]:
    result = {}
    if run.config is not None and not run.test_sets:
        run.lacks("test data", "DATASETS.TEST is empty")
    for name in run.test_sets:
        with _noted(run, "test data"):
            result[name] = find_test_data(run, name, found)
    return result


def _evaluations(run: Run, data: Optional[TestData]) -> List[Evaluation]:
    """Those of the log, else one computed from predictions."""
    logged = logged_evaluations(run)
    if logged:
        return logged
    with _noted(run, "scores"):
        predictions = read_predictions(run)
        if data is None:
            raise ValueError("no evaluation is logged, and there is no ground truth to judge by")
        if not predictions:
            raise ValueError("no evaluation is logged, and there is not a single prediction")
        metrics = box_scores(data.coco, predictions, data.class_names)
        source = f"computed here from {PREDICTIONS}"
        return [Evaluation(data.name, "bbox", metrics, source)]
    return []


def _errors(run: Run, data: Optional[TestData]) -> Optional[Errors]:
    logged = logged_errors(run)
    if logged is not None:
        return logged
    with _noted(run, "errors"):
        read_predictions(run)
        if data is None:
            raise ValueError("none are logged, and there is no ground truth to judge by")
        return computed_errors(run, data)
    return None


def _costs(report: Report) -> List[Optional[Cost]]:
    options = report.options.cost
    networks, costs = {}, {}
    for index, run in enumerate(report.runs):
        logger.info(f"{run.title}: cost")
        with _noted(run, "cost"):
            network = network_of(run, options)
            costs[index] = network.cost
            if options.latency:
                networks[index] = network
    if networks:
        costs.update(timed(networks))
    return [costs.get(index) for index in range(len(report.runs))]


def _galleries(report: Report) -> List[Gallery]:
    result: Dict[str, Gallery] = {}
    for index, run in enumerate(report.runs):
        data = report.test_data[index].get(run.test_sets[-1]) if run.test_sets else None
        if data is None:
            run.lacks("detections", "its test data are not there (see there)")
            continue
        with _noted(run, "detections"):
            if data.identity not in result:
                pictures = chosen_pictures(data, report.options.images)
                result[data.identity] = Gallery(data, pictures)
            gallery = result[data.identity]
            boxes = stored_detections(run, data, gallery.pictures)
            gallery.columns.append((index, boxes or detect(run, gallery.pictures)))
    return [gallery for gallery in result.values() if gallery.columns]
