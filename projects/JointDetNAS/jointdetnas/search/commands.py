"""Parts of search_net.py that need no trainer: reclaiming, tables, choice of a trial."""

import os
from typing import List, Optional

from detectron2.config import CfgNode

from kd_d2.visualization import markdown_table

from .course import Course
from .file_lock import FileLock
from .journal import COMPLETE, Journal
from .methods import SEARCH_METHODS
from .results import HEADER, best_result, giga, pareto_front, points, progress, results, rows
from .students import pool_config
from .worker import worker_lock

__all__ = ["build_course", "choose_trial", "pareto_table", "reclaim", "status"]


def build_course(cfg: CfgNode, create: bool = False) -> Course:
    """The course of the search in ``cfg.OUTPUT_DIR``.

    Args:
        create: the search may begin.

    Raises:
        ValueError: what is wrong with the config, or there is no search.
    """
    name = cfg.SEARCH.METHOD
    if name not in SEARCH_METHODS:
        known = sorted(name for name, _ in SEARCH_METHODS)
        raise ValueError(f"SEARCH.METHOD must be one of {known}, got '{name}'")
    method = SEARCH_METHODS.get(name)(cfg, pool_config(cfg))
    return Course.from_config(cfg, method, Journal(cfg.OUTPUT_DIR, create))


def status(course: Course) -> str:
    """Progress, all trials, and the workers that run."""
    trials = course.journal.trials()
    lines = [progress(course, trials), "", markdown_table(HEADER, rows(course, trials))]
    failed = [(t.number, t.notes.get("error", "")) for t in trials if "error" in t.notes]
    lines += [f"trial {number} failed: {error}" for number, error in failed]
    return "\n".join([*lines, *workers(course.folder)])


def workers(folder: str) -> List[str]:
    """One line for each worker whose lock is there."""
    place = os.path.join(folder, "workers")
    names = sorted(os.listdir(place)) if os.path.isdir(place) else []
    result = []
    for name in names:
        holder = FileLock(os.path.join(place, name)).holder()
        if holder:
            state = "ended without notice" if holder.is_dead else "running"
            result.append(f"worker {name}: {state}, {holder}")
    return result


def reclaim(course: Course, name: str) -> List[int]:
    """Free what a worker had begun that will not come back; return the trials.

    Raises:
        ValueError: it is running on this machine.
    """
    lock = worker_lock(course.folder, name)
    holder = lock.holder()
    if holder and holder.is_local and not holder.is_dead:
        raise ValueError(f"worker '{name}' is running, {holder}: end it first")
    if holder:
        lock.break_lock(holder)
    return course.journal.release(name)


def pareto_table(course: Course) -> str:
    """The students and resolutions that no others beat in AP and complexity."""
    front = pareto_front(points(results(course, course.journal.trials())))
    cells = [(str(p.trial), f"{p.size[0]}x{p.size[1]}", giga(p.macs), f"{p.ap:.2f}") for p in front]
    return markdown_table(("trial", "size", "GMAC", "AP"), cells)


def choose_trial(course: Course, text: str) -> int:
    """Number of the trial that --trial names: "best", or a number.

    Raises:
        ValueError: it is not complete, or its weights were not kept.
    """
    trials = course.journal.trials()
    best: Optional[dict] = best_result(results(course, trials))
    if best is None:
        raise ValueError(f"no trial of {course.folder} is complete yet")
    if text != "best" and not text.isdigit():
        raise ValueError(f"--trial must be a number or 'best', got '{text}'")
    number = best["number"] if text == "best" else int(text)
    if number >= len(trials) or trials[number].state != COMPLETE:
        raise ValueError(f"trial {number} is not complete")
    candidate = course.candidate(number)
    if not candidate.has(candidate.student):
        raise ValueError(
            f"the weights of trial {number} were not kept, only those of the best "
            f"SEARCH.TOP_K {course.top_k}; another search would keep all with "
            "SEARCH.KEEP_ALL_WEIGHTS True"
        )
    return number
