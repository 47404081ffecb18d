"""The course of a search: which trial may begin, what it evaluates, whose weights are kept."""

from typing import Dict, List, Sequence, Set

from .candidate import Candidate
from .journal import COMPLETE, Journal, Trial
from .methods import ranked
from .proposal import Outcome, Proposal

__all__ = ["Course", "READY", "STOP", "WAIT"]

READY, WAIT, STOP = "ready", "wait", "stop"


class Course:
    """The trials of one folder, and the rules by which they follow each other.

    All that it knows is the journal and the results in the folders of the candidates, so any number
    of processes may have one, and none of them has to survive.
    """

    def __init__(
        self,
        folder: str,
        method,
        *,
        journal: Journal,
        max_trials: int = 100,
        patience: int = 30,
        generation: int = 1,
        top_k: int = 5,
        keep_all_weights: bool = False,
    ):
        """
        Args:
            folder: of the search.
            method: has ``propose(number, outcomes)``.
            journal: in that folder.
            max_trials: trial 0 included.
            patience: trials without a better score after which it stops; 0: never.
            generation: trials that do not know each other's results; 0: each knows all that is
                finished.
            top_k: pairs whose weights are needed.
            keep_all_weights: those of all others, too.

        Raises:
            ValueError: a number out of range.
        """
        for key, value, least in (
            ("MAX_TRIALS", max_trials, 1),
            ("PATIENCE", patience, 0),
            ("GENERATION", generation, 0),
        ):
            if value < least:
                raise ValueError(f"SEARCH.{key} must be at least {least}, got {value}")
        self.folder, self.method, self.journal = folder, method, journal
        self.max_trials, self.patience, self.size = max_trials, patience, generation
        self.top_k, self.keep_all_weights = top_k, keep_all_weights
        self._outcomes: Dict[int, Outcome] = {}

    @classmethod
    def from_config(cls, cfg, method, journal: Journal) -> "Course":
        node = cfg.SEARCH
        return cls(
            cfg.OUTPUT_DIR,
            method,
            journal=journal,
            max_trials=node.MAX_TRIALS,
            patience=node.PATIENCE,
            generation=node.GENERATION,
            top_k=node.TOP_K,
            keep_all_weights=node.KEEP_ALL_WEIGHTS,
        )

    def candidate(self, number: int) -> Candidate:
        return Candidate(self.folder, number)

    # ------------------------------------------------------------------------ order of trials
    def generation(self, number: int) -> int:
        """Trial 0 is generation 0; g trials a generation follow. Asynchronous: each its own."""
        return 0 if number == 0 else 1 + (number - 1) // max(self.size, 1)

    def first_of(self, generation: int) -> int:
        """Number of the first trial of a generation."""
        return 0 if generation == 0 else 1 + (generation - 1) * max(self.size, 1)

    def known_to(self, number: int, trials: Sequence[Trial]) -> List[Outcome]:
        """Results that trial ``number`` may depend on."""
        limit = number if self.size == 0 else self.first_of(self.generation(number))
        return [self._outcome(t.number) for t in trials[:limit] if t.state == COMPLETE]

    def state(self, number: int, trials: Sequence[Trial]) -> str:
        """Whether trial ``number`` may be evaluated now, later or not at all."""
        if number >= self.max_trials:
            return STOP
        # asynchronous trials need the base pair only
        limit = min(number, 1) if self.size == 0 else self.first_of(self.generation(number))
        if any(not t.finished for t in trials[:limit]):
            return WAIT
        return STOP if self._exhausted(number, trials) else READY

    def _exhausted(self, number: int, trials: Sequence[Trial]) -> bool:
        known = self.known_to(number, trials)
        if not self.patience or not known:
            return False
        last = (number if self.size == 0 else self.first_of(self.generation(number))) - 1
        return last - ranked(known)[0].number >= self.patience

    def _outcome(self, number: int) -> Outcome:
        if number not in self._outcomes:
            self._outcomes[number] = self.candidate(number).outcome()
        return self._outcomes[number]

    def outcomes(self, trials: Sequence[Trial]) -> List[Outcome]:
        """All results, best first."""
        return ranked([self._outcome(t.number) for t in trials if t.state == COMPLETE])

    def proposal(self, number: int, trials: Sequence[Trial]) -> Proposal:
        """What trial ``number`` evaluates; the same whoever asks, and whenever.

        That of an asynchronous search is kept once it is made.

        Raises:
            ValueError: the base pair failed.
        """
        stored = self.candidate(number).spec()
        if stored is not None:
            return stored
        return self.method.propose(number, self.known_to(number, trials))

    # ------------------------------------------------------------------------------ weights
    def needed(self, trials: Sequence[Trial]) -> Set[int]:
        """Trials whose students others may start from, now or later, and the best ones."""
        best = ranked(self.known_to(len(trials), trials))[: self.top_k]
        # the next generation sees more; what is not among the best now, never will be
        best += self.outcomes(trials)[: self.top_k]
        result = {0, *(outcome.number for outcome in best)}
        # of a search that goes on without choosing, the next trial starts from the last one
        complete = [t.number for t in trials if t.state == COMPLETE]
        known = [o.number for o in self.known_to(len(trials), trials)]
        result |= {*complete[-1:], *known[-1:]}
        for trial in trials:
            if not trial.finished:
                parent = self.proposal(trial.number, trials).parent
                result |= {trial.number} | ({parent} if parent is not None else set())
        return result

    def clean(self) -> None:
        """Remove the weights of candidates that nobody needs any more."""
        trials = self.journal.trials()
        if self.keep_all_weights or not self._all_specified(trials):
            return
        needed = self.needed(trials)
        for trial in trials:
            if trial.number not in needed:
                self.candidate(trial.number).remove_weights()

    def _all_specified(self, trials: Sequence[Trial]) -> bool:
        """False while an asynchronous trial has begun, but not chosen its parent."""
        running = [t.number for t in trials if not t.finished]
        if self.size > 0:
            return all(self.state(n, trials) != WAIT for n in running)
        return all(self.candidate(n).spec() is not None for n in running)
