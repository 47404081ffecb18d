"""What a search has found so far: results, Pareto front, progress in words and rows."""

import statistics
from datetime import timedelta
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .course import Course
from .journal import COMPLETE, FAILED, Trial

__all__ = ["Point", "best_result", "giga", "pareto_front", "points", "progress", "results", "rows"]

Result = Dict[str, Any]
HEADER = ("trial", "worker", "pair", "AP", "size", "GMAC", "score", "minutes")


def results(course: Course, trials: Sequence[Trial]) -> List[Result]:
    """``result.json`` of the complete trials, by number."""
    return [course.candidate(t.number).result() for t in trials if t.state == COMPLETE]


def best_result(found: Sequence[Result]) -> Optional[Result]:
    """The one with the best score, of equal ones the first; None if there is none."""
    return max(found, key=lambda result: (result["score"], -result["number"]), default=None)


class Point(NamedTuple):
    """One student at one resolution: multiply-adds of the detector there, and AP."""

    macs: int
    ap: float
    trial: int
    size: Tuple[int, int]


def points(found: Sequence[Result]) -> List[Point]:
    """All students at all resolutions."""
    return [
        Point(entry["macs"], entry["AP"], result["number"], tuple(entry["size"]))
        for result in found
        for entry in result["sizes"]
    ]


def pareto_front(candidates: Sequence[Point]) -> List[Point]:
    """Points that no other one beats in both AP and cost, cheapest first.

    Of equal ones the earliest trial stays.
    """
    front: List[Point] = []
    for point in sorted(candidates, key=lambda p: (p.macs, -p.ap, p.trial, p.size)):
        if not front or point.ap > front[-1].ap:
            front.append(point)
    return front


def best_entry(result: Result) -> Dict[str, Any]:
    """The entry of ``sizes`` that has the score."""
    return next(entry for entry in result["sizes"] if entry["size"] == result["size"])


def progress(course: Course, trials: Sequence[Trial]) -> str:
    """One line: trials, generation, best score with its AP and complexity, time left."""
    finished = [t for t in trials if t.finished]
    running = [t for t in trials if not t.finished]
    parts = [f"{len(finished)} of {course.max_trials} trials"]
    if trials:
        parts.append(f"generation {course.generation(trials[-1].number)}")
    failed = sum(t.state == FAILED for t in trials)
    parts += [f"{len(running)} running"] + ([f"{failed} failed"] if failed else [])
    best = best_result(results(course, trials))
    if best:
        entry = best_entry(best)
        parts.append(
            f"best score {best['score']:.3f}, trial {best['number']}: AP {entry['AP']:.2f} at "
            f"{entry['size'][0]}x{entry['size'][1]}, {giga(entry['macs'])} GMAC"
        )
    left = time_left(course, trials)
    return "; ".join(parts + ([] if left is None else [f"at most {left} left"]))


def time_left(course: Course, trials: Sequence[Trial]) -> Optional[timedelta]:
    """Time that the remaining trials take if as many go on at a time as now; None: unknown."""
    durations = [(t.ended - t.started).total_seconds() for t in trials if t.state == COMPLETE]
    remaining = course.max_trials - sum(t.finished for t in trials)
    if not durations or remaining < 1:
        return None
    at_a_time = max(1, sum(not t.finished for t in trials))
    # the median: a trial may have waited for its worker to be started again
    return timedelta(seconds=round(statistics.median(durations) * remaining / at_a_time))


def giga(macs: int) -> str:
    """Billions, with four digits: students may be small."""
    return f"{macs / 1e9:.4g}"


def rows(course: Course, trials: Sequence[Trial]) -> List[Tuple[str, ...]]:
    """Cells of ``HEADER`` for every trial."""
    return [_row(course, trial) for trial in trials]


def _row(course: Course, trial: Trial) -> Tuple[str, ...]:
    pair = trial.notes.get("proposal", "")
    start = (str(trial.number), trial.worker or "none", pair)
    if trial.state != COMPLETE:
        return (*start, "", "", "", trial.state, "")
    result = course.candidate(trial.number).result()
    entry = best_entry(result)
    minutes = (trial.ended - trial.started).total_seconds() / 60
    size = f"{entry['size'][0]}x{entry['size'][1]}"
    numbers = (f"{entry['AP']:.2f}", size, giga(entry["macs"]))
    return (*start, *numbers, f"{result['score']:.3f}", f"{minutes:.1f}")
