"""The methods of search: what a trial evaluates, by its number and by earlier results."""

import random
from typing import Any, Dict, List, Optional, Sequence

from detectron2.config import configurable
from detectron2.utils.registry import Registry

from ..elastic_config import pool_of
from ..evolve import StudentMorphism
from ..extraction import as_subnet
from ..morph_resnet import config_architecture
from ..subnet import Subnet, SubnetSpace
from .mutation import TeacherMutation
from .proposal import BASE, NOTHING, POOL, TEACHER, Outcome, Proposal
from .students import inherit, take_from_pool

__all__ = [
    "HillClimbing",
    "PoolSampling",
    "SEARCH_METHODS",
    "draw_by_rank",
    "ranked",
    "trial_generator",
]

SEARCH_METHODS = Registry("SEARCH_METHODS")
SEARCH_METHODS.__doc__ = """
Classes named in SEARCH.METHOD, called as ``Name(cfg, pool_cfg)``, pool_cfg being the config of the
elastic pool, or None. ``propose(number, outcomes)`` returns a :class:`Proposal`.
"""


def trial_generator(seed: int, number: int) -> random.Random:
    """The generator of one trial: the same one in every worker and after every restart."""
    return random.Random(f"{seed}-{number}")


def ranked(outcomes: Sequence[Outcome]) -> List[Outcome]:
    """Best score first; of equal ones the earlier trial."""
    return sorted(outcomes, key=lambda outcome: (-outcome.score, outcome.number))


def draw_by_rank(generator: random.Random, best: Sequence[Outcome]) -> Outcome:
    """One of k pairs, best first, with weights k, k-1, ..., 1 (A.1.4: "according to the score
    ranking")."""
    return generator.choices(best, weights=range(len(best), 0, -1))[0]


def checked_seed(cfg) -> int:
    """``SEED``, which says what is drawn.

    Raises:
        ValueError: it is negative, and would be another one in every process.
    """
    if cfg.SEED < 0:
        raise ValueError(f"SEED of a search must be 0 or more, got {cfg.SEED}")
    return cfg.SEED


@SEARCH_METHODS.register()
class HillClimbing:
    """Algorithm 1 of the paper: a pair of the top-k list, of which one half is changed."""

    @configurable
    def __init__(
        self,
        *,
        seed: int,
        morphism: StudentMorphism,
        mutation: Optional[TeacherMutation] = None,
        first_teacher: str = "",
        top_k: int = 5,
        fixed_student_trials: int = 5,
        student_probability: float = 0.5,
        script: Sequence[str] = (),
    ):
        """
        Args:
            seed: of all draws.
            morphism: the student's actions; may have none.
            mutation: of teachers; None: they stay what they are.
            first_teacher: code of the base pair's.
            top_k: length of the list of parents.
            fixed_student_trials: first trials that change the teacher only.
            student_probability: of a change of the student later on.
            script: what the first trials after the base change; "" for a random choice.

        Raises:
            ValueError: a number out of range, or a script of unknown changes.
        """
        if top_k < 1:
            raise ValueError(f"SEARCH.TOP_K must be at least 1, got {top_k}")
        if not 0 <= student_probability <= 1:
            raise ValueError(
                f"SEARCH.STUDENT_PROBABILITY must be in [0, 1], got {student_probability}"
            )
        known = {"", TEACHER, *morphism.actions}
        for name in script:
            if name not in known:
                raise ValueError(f"SEARCH.SCRIPT names '{name}', known are {sorted(known)}")
        self.seed, self.morphism, self.mutation = seed, morphism, mutation
        self.first_teacher, self.top_k = first_teacher, top_k
        self.fixed_student_trials = fixed_student_trials
        self.student_probability, self.script = student_probability, tuple(script)

    @classmethod
    def from_config(cls, cfg, pool_cfg=None) -> Dict[str, Any]:
        """Read ``SEARCH``; ``pool_cfg`` is needed if teachers mutate.

        Raises:
            ValueError: they do, but the teacher is no subnet of a pool.
        """
        node = cfg.SEARCH
        first, mutation = cfg.KD.TEACHER.ELASTIC.SUBNET, None
        if node.TEACHER_MUTATION:
            if pool_cfg is None:
                raise ValueError(
                    "SEARCH.TEACHER_MUTATION is True, but there is no pool: set KD.ENABLED to True "
                    "and KD.TEACHER.TYPE to 'ElasticTeacher', or TEACHER_MUTATION to False"
                )
            first = str(as_subnet(first, pool_cfg))
            mutation = TeacherMutation(
                pool_of(pool_cfg)[1],
                probability=node.MUTATION.PROBABILITY,
                depth_step=node.MUTATION.DEPTH_STEP,
            )
        return {
            "seed": checked_seed(cfg),
            "morphism": StudentMorphism(cfg, config_architecture(cfg)),
            "mutation": mutation,
            "first_teacher": first,
            "top_k": node.TOP_K,
            "fixed_student_trials": node.FIXED_STUDENT_TRIALS,
            "student_probability": node.STUDENT_PROBABILITY,
            "script": node.SCRIPT,
        }

    def propose(self, number: int, outcomes: Sequence[Outcome]) -> Proposal:
        """
        Args:
            number: of the trial; 0 is the base pair.
            outcomes: complete trials that it may know, in any order.

        Raises:
            ValueError: there are none for a later trial: the base pair failed.
        """
        if number == 0:
            return Proposal(0, BASE, None, None, self.first_teacher)
        if not outcomes:
            raise ValueError("the base pair, trial 0, has no result that others could start from")
        generator = trial_generator(self.seed, number)
        parent = draw_by_rank(generator, ranked(outcomes)[: self.top_k])
        legal = self.morphism.legal(parent.architecture)
        change = self._choose(number, parent, list(legal), generator)
        if change in legal:
            action = generator.choice(legal[change])
            return Proposal(number, change, parent.number, action, parent.teacher)
        if change == TEACHER:
            teacher = str(self.mutation(Subnet.parse(parent.teacher), generator))
            return Proposal(number, change, parent.number, None, teacher)
        # one round after the other, whatever their scores
        last = max(outcomes, key=lambda outcome: outcome.number)
        return Proposal(number, NOTHING, last.number, None, last.teacher)

    def make_student(self, cfg, proposal: Proposal, candidate, parent, store: str) -> None:
        """Write the student that is then trained; see :func:`.students.inherit`."""
        inherit(cfg, proposal, candidate, parent, store)

    def _choose(
        self, number: int, parent: Outcome, actions: List[str], generator: random.Random
    ) -> str:
        mutable = self.mutation is not None and self.mutation.genes(Subnet.parse(parent.teacher))
        possible = [*actions, *([TEACHER] if mutable else [])]
        if number <= len(self.script) and self.script[number - 1] in possible:
            return self.script[number - 1]
        fixed = number <= self.fixed_student_trials
        student = not fixed and generator.random() < self.student_probability
        if mutable and not (student and actions):
            return TEACHER
        return generator.choice(actions) if actions else NOTHING


@SEARCH_METHODS.register()
class PoolSampling:
    """Search with the pool alone (appendix F, Table 10): its subnets are the candidates.

    The first one is ``KD.TEACHER.ELASTIC.SUBNET``, by default the largest; the others are drawn.
    """

    @configurable
    def __init__(self, *, seed: int, space: SubnetSpace, first: str):
        self.seed, self.space, self.first = seed, space, first

    @classmethod
    def from_config(cls, cfg, pool_cfg=None) -> Dict[str, Any]:
        if pool_cfg is None:
            raise ValueError(
                "SEARCH.METHOD 'PoolSampling' draws subnets of a pool: set KD.ENABLED to True and "
                "KD.TEACHER.TYPE to 'ElasticTeacher'"
            )
        first = str(as_subnet(cfg.KD.TEACHER.ELASTIC.SUBNET, pool_cfg))
        return {"seed": checked_seed(cfg), "space": pool_of(pool_cfg)[1], "first": first}

    def propose(self, number: int, outcomes: Sequence[Outcome]) -> Proposal:
        """Return a subnet; what was found before does not matter."""
        code = str(self.space.sample(trial_generator(self.seed, number))) if number else self.first
        return Proposal(number, POOL, None, None, code)

    def make_student(self, cfg, proposal: Proposal, candidate, parent, store: str) -> None:
        """Write the student, which is not trained; see :func:`.students.take_from_pool`."""
        take_from_pool(cfg, proposal, candidate)
