"""Searches without detectors: the score of a candidate is a pure function of what it is."""

import hashlib
import multiprocessing
import os
import time
from typing import Any, Callable, List, Sequence

from kd_d2.projects.jointdetnas import Architecture, StudentMorphism, SubnetSpace, parse
from kd_d2.projects.jointdetnas.search.course import Course
from kd_d2.projects.jointdetnas.search.journal import Journal
from kd_d2.projects.jointdetnas.search.methods import HillClimbing
from kd_d2.projects.jointdetnas.search.mutation import TeacherMutation
from kd_d2.projects.jointdetnas.search.proposal import Proposal
from kd_d2.projects.jointdetnas.search.worker import Worker
from tests.fixtures import tiny_cfg
from tests.projects.jointdetnas.cases import BOTTLENECK, STEM

SPACE = SubnetSpace(((1, 2), (1, 2), (1, 3), (1, 2)), (4, 5, 6))
ROOT = parse(BOTTLENECK, STEM)


def hill_climbing(seed: int = 0, mutate: bool = True, actions=None, **options: Any) -> HillClimbing:
    cfg = tiny_cfg("GeneralizedRCNN")
    cfg.SEARCH.LAYER_PRUNING.PROTECT = 1
    cfg.SEARCH.CHANNEL_PRUNING.MIN_CHANNELS = 2
    if actions is not None:
        cfg.SEARCH.STUDENT_ACTIONS = actions
    mutation = TeacherMutation(SPACE, probability=0.15, depth_step=4) if mutate else None
    return HillClimbing(
        seed=seed,
        morphism=StudentMorphism(cfg, ROOT),
        mutation=mutation,
        first_teacher=str(SPACE.largest),
        **options,
    )


def course(folder, method=None, **options: Any) -> Course:
    return Course(str(folder), method or hill_climbing(), journal=Journal(str(folder)), **options)


def fake_score(architecture: Architecture, teacher: str) -> float:
    digest = hashlib.sha256(f"{architecture} {teacher}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 * 100


def changed(architecture: Architecture, proposal: Proposal) -> Architecture:
    """Some other architecture where the student changes."""
    if proposal.action is None:
        return architecture
    stages = [list(blocks) for blocks in architecture.stages]
    if proposal.change == "AddLayer":
        stages[proposal.action.stage].append(stages[proposal.action.stage][-1])
    elif proposal.change == "LayerPruning":
        stage = max(range(4), key=lambda s: len(stages[s]))
        stages[stage].pop()
    return Architecture(tuple(map(tuple, stages)), architecture.stem)


def fake_evaluation(search: Course, seconds: float = 0.0) -> Callable[[int], None]:
    """Leaves a result as a real evaluation does; the file ``evaluations`` has a line for each."""

    def evaluate(number: int) -> None:
        candidate = search.candidate(number)
        proposal = candidate.spec()
        architecture = ROOT
        if proposal.parent is not None:
            architecture = search.candidate(proposal.parent).outcome().architecture
        architecture = changed(architecture, proposal)
        time.sleep(seconds)
        candidate.write_result(
            {
                "score": fake_score(architecture, proposal.teacher),
                "arch": architecture.older().entry(),
                "teacher": proposal.teacher,
            }
        )
        with open(candidate.path("evaluations"), "a") as file:
            file.write("done\n")

    return evaluate


def trajectory(search: Course) -> List[Any]:
    """What every trial was and what came out."""
    result = []
    for trial in search.journal.trials():
        candidate = search.candidate(trial.number)
        result.append((candidate.spec(), trial.state, trial.score))
    return result


def evaluations(search: Course) -> List[int]:
    """How often each trial's evaluation got to its end."""
    result = []
    for trial in search.journal.trials():
        path = search.candidate(trial.number).path("evaluations")
        result.append(len(open(path).readlines()) if os.path.isfile(path) else 0)
    return result


def run_alone(folder, method=None, **options: Any) -> Course:
    """The search by a single worker in this process."""
    search = course(folder, method, **options)
    Worker(search, "alone", fake_evaluation(search), poll=0.01).run()
    return search


# ---------------------------------------------------------------------------- real processes
def _process(folder, name: str, options, seconds: float) -> None:
    search = course(folder, hill_climbing(), **options)
    Worker(search, name, fake_evaluation(search, seconds), poll=0.01).run()
    os._exit(0)


def start(folder, name: str, options, seconds: float = 0.05):
    process = multiprocessing.get_context("fork").Process(
        target=_process, args=(folder, name, options, seconds)
    )
    process.start()
    return process


def kill(process) -> bool:
    """SIGKILL; False if it had ended by itself."""
    process.kill()
    process.join()
    return process.exitcode != 0


def join(processes: Sequence, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        assert process.exitcode == 0, process
