"""A worker of a search: takes trials, has them evaluated, enters their scores."""

import logging
import math
import os
import time
from typing import Callable, List, Optional, Sequence

from .course import READY, STOP, Course
from .file_lock import FileLock, held
from .journal import Trial

__all__ = ["EvaluationError", "Worker", "worker_lock"]

logger = logging.getLogger(__name__)

# Evaluates a trial: leaves result.json in the folder of its candidate.
Evaluate = Callable[[int], None]


class EvaluationError(Exception):
    """An evaluation failed; the message says why, the search goes on."""


def worker_lock(folder: str, name: str) -> FileLock:
    """The lock that a worker of this name has while it runs."""
    return FileLock(os.path.join(os.path.abspath(folder), "workers", name), grace=None)


class Worker:
    """Evaluates one trial after the other until the search is over.

    It may be killed at any moment. Another process with the same name then takes over what it had
    begun: a result that is there is entered, an evaluation without one is done again or continued.
    """

    def __init__(
        self,
        course: Course,
        name: str,
        evaluate: Evaluate,
        *,
        attempts: int = 3,
        poll: float = 5.0,
        report: Optional[Callable[[], None]] = None,
    ):
        """
        Args:
            course: of the search.
            name: of the worker, a file name; no two processes at a time have the same.
            evaluate: called with the number of a trial whose ``spec.json`` is there, several times
                if it was interrupted. Leaves ``result.json``.
            attempts: calls that may raise ``EvaluationError`` before the trial counts as failed.
            poll: seconds between two looks at the journal while waiting for others.
            report: called after every trial, and at the start.

        Raises:
            ValueError: a name that is no file name, or no attempt.
        """
        if not name or name != os.path.basename(name) or name.startswith("."):
            raise ValueError(f"--worker-id must be usable as a file name, got '{name}'")
        if attempts < 1:
            raise ValueError(f"SEARCH.ATTEMPTS must be at least 1, got {attempts}")
        self.course, self.name, self.evaluate = course, name, evaluate
        self.attempts, self.poll, self.report = attempts, poll, report or (lambda: None)
        self._failed_in_a_row = 0

    def run(self) -> None:
        """
        Raises:
            ValueError: another process has this name, the base pair failed, or several trials in a
                row failed here.
        """
        lock = worker_lock(self.course.folder, self.name)
        os.makedirs(os.path.dirname(lock.path), exist_ok=True)
        message = (
            f"a worker '{self.name}' is running already, {{holder}}: give another --worker-id, or, "
            f"if that machine is gone, run reclaim --worker-id {self.name}"
        )
        with held(lock, message):
            self.report()
            while self._step():
                pass

    def _step(self) -> bool:
        """Do one thing; False if the search is over."""
        journal = self.course.journal
        trials = journal.trials()
        running = [t for t in trials if not t.finished]
        own = [t for t in running if t.worker == self.name]
        free = [t for t in running if not t.worker]
        if own:
            return self._go_on(own[0].number, trials)
        if free:
            journal.adopt(free[0].number, self.name)
            return True
        state = self.course.state(len(trials), trials)
        if state == STOP:
            return False
        if state == READY:
            self._check_base(trials)
            journal.begin(len(trials), self.name)
        else:
            self._wait(running)
        return True

    def _go_on(self, number: int, trials: Sequence[Trial]) -> bool:
        state = self.course.state(number, trials)
        if state == READY:
            self._trial(number, trials)
        elif state == STOP:
            self.course.journal.fail(number, "begun after the end of the search")
        else:
            self._wait([t for t in trials if not t.finished and t.number < number])
        return True

    def _wait(self, running: List[Trial]) -> None:
        who = ", ".join(f"trial {t.number} ({t.worker or 'no worker'})" for t in running)
        logger.debug(f"waiting for {who}")
        time.sleep(self.poll)

    def _check_base(self, trials: Sequence[Trial]) -> None:
        if trials and not self.course.known_to(len(trials), trials):
            raise ValueError(
                "the base pair, trial 0, failed, so there is nothing to start from; see "
                f"{self.course.candidate(0).log}, mend it and begin in another OUTPUT_DIR"
            )

    def _trial(self, number: int, trials: Sequence[Trial]) -> None:
        journal, candidate = self.course.journal, self.course.candidate(number)
        proposal = self.course.proposal(number, trials)
        candidate.write_spec(proposal)
        journal.note(number, proposal=str(proposal))
        error = self._evaluated(number)
        if not self._is_mine(number):
            logger.warning(f"trial {number} was taken over by another worker")
            return
        if error:
            journal.fail(number, error)
            logger.error(f"trial {number} failed: {error}")
        else:
            journal.complete(number, candidate.result()["score"])
        self.course.clean()
        self.report()
        self._failed_in_a_row = self._failed_in_a_row + 1 if error else 0
        if self._failed_in_a_row >= self.attempts:
            raise ValueError(
                f"{self._failed_in_a_row} trials in a row failed here, the last one with: {error}. "
                "Mend what is wrong and start the worker again"
            )

    def _evaluated(self, number: int) -> str:
        """Evaluate unless that is done; return what was wrong, or nothing."""
        candidate, error = self.course.candidate(number), ""
        for attempt in range(self.attempts):
            if candidate.result() is None:
                try:
                    self.evaluate(number)
                except EvaluationError as failure:
                    error = str(failure)
                    logger.warning(f"trial {number}, attempt {attempt + 1}: {error}")
                    continue
            result = candidate.result()
            if result is None:
                error = "the evaluation ended without a result"
                continue
            return "" if _finite(result["score"]) else f"its score is {result['score']}"
        return error

    def _is_mine(self, number: int) -> bool:
        trial = self.course.journal.trials()[number]
        return trial.worker == self.name and not trial.finished


def _finite(score) -> bool:
    return score is not None and math.isfinite(score)
