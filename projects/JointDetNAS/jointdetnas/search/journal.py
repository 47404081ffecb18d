"""The trials of a search, in Optuna's journal: numbers, states and owners that survive any kill."""

import logging
import os
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Dict, List, Optional

from .file_lock import FileLock

__all__ = ["COMPLETE", "FAILED", "RUNNING", "Journal", "Trial", "repair"]

logger = logging.getLogger(__name__)

FILE = "journal.log"
_STUDY = "joint-detnas"
RUNNING, COMPLETE, FAILED = "running", "complete", "failed"
_WORKER = "worker"


@dataclass(frozen=True)
class Trial:
    """What the journal says about a trial.

    Args:
        number: 0, 1, ... in the order in which they were begun.
        state: ``RUNNING``, ``COMPLETE`` or ``FAILED``.
        worker: name of the worker that has it; empty: whoever comes may take it.
        score: of a complete one.
        started, ended: local times; ``ended`` of finished ones.
        notes: for readers only.
    """

    number: int
    state: str
    worker: str
    score: Optional[float]
    started: datetime
    ended: Optional[datetime]
    notes: Dict[str, Any]

    @property
    def finished(self) -> bool:
        return self.state != RUNNING


class Journal:
    """The journal in the folder of a search. Any number of processes may use it at a time.

    Every change is one line of a file that only grows. Whoever begins a trial is named in the line
    that begins it, so no kill leaves a trial without an owner.
    """

    def __init__(self, folder: str, create: bool = True):
        """
        Args:
            folder: of the search.
            create: make folder and journal if they are not there.

        Raises:
            ValueError: there is no journal, or the package optuna is missing.
        """
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise ValueError(
                f"a search needs the package optuna ({error}): pip install 'kd-d2[search]'"
            ) from error
        path = os.path.join(os.path.abspath(folder), FILE)
        if create:
            os.makedirs(folder, exist_ok=True)
        elif not os.path.isfile(path):
            raise ValueError(f"OUTPUT_DIR {folder} is not the folder of a search: it has no {FILE}")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        lock = _RepairingLock(path)
        with lock:
            pass  # before anything is read
        self._storage = JournalStorage(JournalFileBackend(path, lock_obj=lock))
        # no parameter is ever suggested: proposals are the paper's
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=_STUDY,
            direction="maximize",
            sampler=optuna.samplers.RandomSampler(seed=0),
            load_if_exists=True,
        )
        self._study_id = self._storage.get_study_id_from_name(_STUDY)
        self._claims = FileLock(os.path.join(os.path.dirname(path), "claim.lock"))

    def trials(self) -> List[Trial]:
        """All trials by number, as the file says now."""
        states = self._optuna.trial.TrialState
        names = {states.COMPLETE: COMPLETE, states.FAIL: FAILED, states.RUNNING: RUNNING}
        return [
            Trial(
                number=t.number,
                state=names.get(t.state, FAILED),
                worker=t.user_attrs.get(_WORKER, ""),
                score=t.value if t.state == states.COMPLETE else None,
                started=t.datetime_start,
                ended=t.datetime_complete,
                notes={k: v for k, v in t.user_attrs.items() if k != _WORKER},
            )
            for t in self._study.get_trials(deepcopy=False)
        ]

    def begin(self, number: int, worker: str) -> bool:
        """Begin trial ``number`` for ``worker``; False if somebody else already has.

        This is Optuna's ``ask``, with the owner in the same line of the file.
        """
        with self._claims:
            if len(self.trials()) != number:
                return False
            trial = self._optuna.trial.create_trial(
                state=self._optuna.trial.TrialState.RUNNING, user_attrs={_WORKER: worker}
            )
            self._study.add_trial(trial)
            return True

    def adopt(self, number: int, worker: str) -> bool:
        """Give a running trial without owner to ``worker``; False if it has one by now."""
        with self._claims:
            trial = self.trials()[number]
            if trial.finished or trial.worker:
                return False
            self._note(number, _WORKER, worker)
            return True

    def release(self, worker: str) -> List[int]:
        """Take the running trials of ``worker`` from it; return their numbers."""
        with self._claims:
            numbers = [t.number for t in self.trials() if not t.finished and t.worker == worker]
            for number in numbers:
                self._note(number, _WORKER, "")
            return numbers

    def note(self, number: int, **notes: Any) -> None:
        """Keep plain values for readers of the journal with a running trial."""
        for key, value in notes.items():
            self._note(number, key, value)

    def complete(self, number: int, score: float) -> None:
        """End a trial with its score; nothing if it has ended already."""
        self._study.tell(number, score, skip_if_finished=True)

    def fail(self, number: int, reason: str) -> None:
        """End a trial without a score; nothing if it has ended already."""
        if not self.trials()[number].finished:
            self._note(number, "error", reason)
        state = self._optuna.trial.TrialState.FAIL
        self._study.tell(number, state=state, skip_if_finished=True)

    def _note(self, number: int, key: str, value: Any) -> None:
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        try:
            self._storage.set_trial_user_attr(trial_id, key, value)
        except self._optuna.exceptions.UpdateFinishedTrialError:
            pass  # another process has ended it in the meantime


class _RepairingLock(FileLock):
    """The lock of those who append to the journal; whoever has it finds whole lines only."""

    def __init__(self, path: str):
        super().__init__(f"{path}.lock")
        self._journal = path

    def acquire(self) -> bool:
        super().acquire()
        repair(self._journal)
        return True


def repair(path: str) -> int:
    """Cut off the half line that a crash left at the end; the caller has the lock.

    It does no harm until the next line is appended to it; from then on no one could read on.

    Returns:
        number of bytes that were cut off.
    """
    if not os.path.isfile(path):
        return 0
    with open(path, "rb+") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return 0
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return 0
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        logger.warning(f"{path} ends with an incomplete line, which is cut off")
        file.truncate(whole)
        file.flush()
        os.fsync(file.fileno())
    return len(content) - whole
