"""The same course of a search with one and several workers, killed at any moment."""

import random
import time

import pytest

from kd_d2.projects.jointdetnas.search.journal import COMPLETE
from tests.projects.jointdetnas.search_cases import (
    course,
    evaluations,
    join,
    kill,
    run_alone,
    start,
    trajectory,
)

TRIALS = 13


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Generation -> trajectory of one undisturbed worker."""
    result = {}
    for generation in (1, 3):
        folder = tmp_path_factory.mktemp(f"reference{generation}")
        search = run_alone(folder, max_trials=TRIALS, generation=generation)
        result[generation] = trajectory(search)
        assert [state for _, state, _ in result[generation]] == [COMPLETE] * TRIALS
    assert result[1] != result[3]
    return result


@pytest.mark.distributed
@pytest.mark.parametrize("generation, workers", [(1, 3), (3, 3)])
def test_number_of_workers_does_not_matter(generation, workers, reference, tmp_path):
    options = {"max_trials": TRIALS, "generation": generation}
    join([start(tmp_path, f"w{i}", options) for i in range(workers)])
    search = course(tmp_path, **options)
    assert trajectory(search) == reference[generation]
    assert evaluations(search) == [1] * TRIALS
    if generation == 3:
        assert len({t.worker for t in search.journal.trials()}) == 3


@pytest.mark.distributed
@pytest.mark.parametrize("generation, workers, seed", [(1, 1, 0), (3, 3, 1), (3, 3, 2)])
def test_random_kills(generation, workers, seed, reference, tmp_path):
    options = {"max_trials": TRIALS, "generation": generation}
    draw = random.Random(seed)
    # long enough for the search to last as long as the kills do
    seconds = 0.2
    processes = {f"w{i}": start(tmp_path, f"w{i}", options, seconds) for i in range(workers)}
    killed = 0
    for _ in range(9):
        time.sleep(draw.uniform(0.0, 0.15))
        name = draw.choice(sorted(processes))
        killed += kill(processes[name])
        processes[name] = start(tmp_path, name, options, seconds)
    assert killed >= 4
    join(list(processes.values()))
    search = course(tmp_path, **options)
    assert trajectory(search) == reference[generation]
    # an evaluation that was killed between its result and the line that counts it has none
    assert max(evaluations(search)) == 1
