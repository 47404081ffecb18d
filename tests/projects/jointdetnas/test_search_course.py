"""Order of trials, workers that go on where one was killed, weights that are kept."""

import os

import pytest

from kd_d2.projects.jointdetnas.search.candidate import Candidate
from kd_d2.projects.jointdetnas.search.journal import COMPLETE, FAILED, RUNNING
from kd_d2.projects.jointdetnas.search.worker import EvaluationError, Worker, worker_lock
from tests.projects.jointdetnas.search_cases import (
    course,
    evaluations,
    fake_evaluation,
    hill_climbing,
    run_alone,
    trajectory,
)


class Killed(BaseException):
    """Nobody catches this, as nobody catches SIGKILL."""


def test_generations(tmp_path):
    by_three = course(tmp_path, generation=3)
    assert [by_three.generation(n) for n in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]
    assert [by_three.first_of(g) for g in range(4)] == [0, 1, 4, 7]
    one_by_one = course(tmp_path, generation=1)
    assert [one_by_one.generation(n) for n in range(4)] == [0, 1, 2, 3]


def test_trials_know_earlier_generations_only(tmp_path):
    search = course(tmp_path, generation=2, max_trials=6)
    evaluate = fake_evaluation(search)

    def finish(number):
        search.journal.begin(number, "a")
        search.candidate(number).write_spec(search.proposal(number, search.journal.trials()))
        evaluate(number)
        search.journal.complete(number, search.candidate(number).result()["score"])

    def states():
        trials = search.journal.trials()
        return search.state(len(trials), trials)

    def known(number):
        return sorted(o.number for o in search.known_to(number, search.journal.trials()))

    assert states() == "ready"
    search.journal.begin(0, "a")
    assert states() == "wait"
    search.candidate(0).write_spec(search.proposal(0, search.journal.trials()))
    evaluate(0)
    search.journal.complete(0, 1.0)
    finish(1)
    assert states() == "ready" and known(2) == [0] and known(3) == [0, 1]
    search.journal.begin(2, "b")
    assert states() == "wait"  # trial 3 needs trial 2
    search.journal.fail(2, "")
    assert states() == "ready" and known(3) == [0, 1]
    finish(3)
    finish(4)
    assert known(4) == [0, 1] and known(5) == [0, 1, 3, 4]
    finish(5)
    assert states() == "stop"


def test_patience(tmp_path):
    """Of trials 0, 1, 2, ... number 1 is the best: it stops when two more were no better."""
    search = course(tmp_path, patience=2, max_trials=50)
    evaluate = fake_evaluation(search)

    def scored(number):
        evaluate(number)
        candidate = search.candidate(number)
        candidate.write_result({**candidate.result(), "score": 9.0 if number == 1 else 1.0})

    Worker(search, "a", scored, poll=0.01).run()
    assert len(search.journal.trials()) == 4
    # more patience, more trials; the ones before stay
    search.patience = 4
    Worker(search, "a", scored, poll=0.01).run()
    assert len(search.journal.trials()) == 6
    search.patience, search.max_trials = 0, 9
    Worker(search, "a", scored, poll=0.01).run()
    assert len(search.journal.trials()) == 9


def test_longer_search_begins_like_the_shorter(tmp_path):
    short = run_alone(tmp_path / "a", max_trials=6)
    begun = trajectory(short)
    long = run_alone(tmp_path / "b", max_trials=10)
    assert trajectory(long)[:6] == begun
    assert trajectory(run_alone(tmp_path / "a", max_trials=10)) == trajectory(long)
    assert evaluations(long) == [1] * 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_trials": 0}, "SEARCH.MAX_TRIALS must be at least 1, got 0"),
        ({"patience": -1}, "SEARCH.PATIENCE must be at least 0, got -1"),
        ({"generation": -1}, "SEARCH.GENERATION must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        course(tmp_path, **options)


# ---------------------------------------------------------------------------------- restarts
def after_begin(search, monkeypatch):
    begin = search.journal.begin

    def killed(number, worker):
        begin(number, worker)
        if number == 3:
            raise Killed

    monkeypatch.setattr(search.journal, "begin", killed)
    return fake_evaluation(search)


def before_evaluation(search, monkeypatch):
    evaluate = fake_evaluation(search)

    def killed(number):
        if number == 3:
            raise Killed
        evaluate(number)

    return killed


def after_result(search, monkeypatch):
    evaluate = fake_evaluation(search)

    def killed(number):
        evaluate(number)
        if number == 3:
            raise Killed

    return killed


def before_complete(search, monkeypatch):
    complete = search.journal.complete

    def killed(number, score):
        if number == 3:
            raise Killed
        complete(number, score)

    monkeypatch.setattr(search.journal, "complete", killed)
    return fake_evaluation(search)


def after_complete(search, monkeypatch):
    complete = search.journal.complete

    def killed(number, score):
        complete(number, score)
        if number == 3:
            raise Killed

    monkeypatch.setattr(search.journal, "complete", killed)
    return fake_evaluation(search)


@pytest.mark.parametrize(
    "moment", [after_begin, before_evaluation, after_result, before_complete, after_complete]
)
@pytest.mark.parametrize("generation", [1, 0])
def test_killed_and_started_again(moment, generation, tmp_path, monkeypatch):
    options = {"max_trials": 7, "generation": generation}
    expected = trajectory(run_alone(tmp_path / "undisturbed", **options))
    search = course(tmp_path / "killed", **options)
    with pytest.raises(Killed):
        Worker(search, "alone", moment(search, monkeypatch), poll=0.01).run()
    assert len(search.journal.trials()) == 4
    again = run_alone(tmp_path / "killed", **options)
    assert trajectory(again) == expected
    assert evaluations(again) == [1] * 7


def test_one_process_for_each_name(tmp_path):
    search = course(tmp_path, max_trials=2)
    lock = worker_lock(str(tmp_path), "a")
    os.makedirs(tmp_path / "workers")
    lock.acquire()
    with pytest.raises(ValueError, match="a worker 'a' is running already, process"):
        Worker(search, "a", fake_evaluation(search)).run()
    lock.release()
    Worker(search, "a", fake_evaluation(search)).run()
    assert lock.holder() is None
    for name in ("", "a/b", ".hidden"):
        with pytest.raises(ValueError, match="--worker-id must be usable as a file name"):
            Worker(search, name, fake_evaluation(search))
    with pytest.raises(ValueError, match="ATTEMPTS must be at least 1, got 0"):
        Worker(search, "a", fake_evaluation(search), attempts=0)


def test_trial_of_another_worker_is_left_alone(tmp_path):
    """Until somebody says that its worker is gone."""
    search = course(tmp_path, max_trials=4, generation=3)
    evaluate = fake_evaluation(search)
    search.journal.begin(0, "other")
    waits = []

    def impatient(number):
        raise AssertionError(number)

    worker = Worker(search, "me", impatient, poll=0.0)
    worker._wait = lambda running: waits.append([t.number for t in running])
    for _ in range(3):
        assert worker._step()
    assert waits == [[0]] * 3 and search.journal.trials()[0].worker == "other"
    search.journal.release("other")
    Worker(search, "me", evaluate, poll=0.01).run()
    assert {t.worker for t in search.journal.trials()} == {"me"}
    assert evaluations(search) == [1] * 4


def test_result_of_a_trial_that_was_taken_away(tmp_path):
    search = course(tmp_path, max_trials=1)
    evaluate = fake_evaluation(search)

    def slow(number):
        evaluate(number)
        search.journal.release("slow")
        search.journal.adopt(number, "fast")

    worker = Worker(search, "slow", slow, poll=0.01)
    assert worker._step() and worker._step()
    (trial,) = search.journal.trials()
    assert (trial.state, trial.worker) == (RUNNING, "fast")
    Worker(search, "fast", evaluate, poll=0.01).run()
    assert search.journal.trials()[0].state == COMPLETE and evaluations(search) == [1]


# ---------------------------------------------------------------------------------- failures
def test_failures(tmp_path):
    """Trial 2 fails for good, trial 4 once; the others are those that follow."""
    search = course(tmp_path, max_trials=7)
    evaluate, calls = fake_evaluation(search), []

    def unreliable(number):
        calls.append(number)
        if number == 2 or (number == 4 and calls.count(4) == 1):
            raise EvaluationError("out of memory")
        evaluate(number)

    Worker(search, "a", unreliable, poll=0.01).run()
    trials = search.journal.trials()
    assert [t.state for t in trials] == [COMPLETE, COMPLETE, FAILED, *[COMPLETE] * 4]
    assert trials[2].notes["error"] == "out of memory"
    assert calls == [0, 1, 2, 2, 2, 3, 4, 4, 5, 6]
    assert all(search.candidate(n).spec().parent != 2 for n in range(7))


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None])
def test_score_that_is_none(score, tmp_path):
    search = course(tmp_path, max_trials=3)
    evaluate = fake_evaluation(search)

    def broken(number):
        evaluate(number)
        if number == 1:
            candidate = search.candidate(number)
            candidate.write_result({**candidate.result(), "score": score})

    Worker(search, "a", broken, poll=0.01).run()
    assert [t.state for t in search.journal.trials()] == [COMPLETE, FAILED, COMPLETE]
    assert evaluations(search) == [1, 1, 1]


def test_evaluation_without_result(tmp_path):
    search = course(tmp_path, max_trials=2)
    evaluate = fake_evaluation(search)
    Worker(search, "a", lambda n: evaluate(n) if n == 0 else None, poll=0.01).run()
    assert search.journal.trials()[1].notes["error"] == "the evaluation ended without a result"


def test_failed_base_and_failures_in_a_row(tmp_path):
    def broken(number):
        raise EvaluationError("disk full")

    search = course(tmp_path / "a", max_trials=9)
    with pytest.raises(ValueError, match="the base pair, trial 0, failed"):
        Worker(search, "a", broken, poll=0.01).run()
    assert len(search.journal.trials()) == 1
    search = course(tmp_path / "b", max_trials=9)
    evaluate = fake_evaluation(search)
    with pytest.raises(ValueError, match="3 trials in a row failed here.*disk full"):
        Worker(search, "a", lambda n: (broken if n in (2, 3, 4) else evaluate)(n)).run()
    Worker(search, "a", evaluate, poll=0.01).run()
    assert [t.state for t in search.journal.trials()].count(COMPLETE) == 6


# ----------------------------------------------------------------------------------- weights
def weights_of(search):
    return {
        t.number
        for t in search.journal.trials()
        if os.path.exists(search.candidate(t.number).student)
    }


@pytest.mark.parametrize("generation", [1, 3, 0])
def test_weights_that_are_kept(generation, tmp_path):
    """Base and best two; a parent is there whenever a trial begins."""
    search = course(tmp_path, hill_climbing(top_k=2), max_trials=16, generation=generation, top_k=2)
    evaluate = fake_evaluation(search)

    def with_weights(number):
        candidate = search.candidate(number)
        parent = candidate.spec().parent
        assert parent is None or os.path.exists(search.candidate(parent).student), number
        for name in ("student.pth", "init.pth", "model_0000003.pth", "last_checkpoint", "log.txt"):
            with open(candidate.path(name), "w"):
                pass
        evaluate(number)

    Worker(search, "a", with_weights, poll=0.01).run()
    best = [o.number for o in search.outcomes(search.journal.trials())]
    assert weights_of(search) == {0, *best[:2], 15}
    gone = search.candidate(best[-1] or best[-2])
    assert sorted(os.listdir(gone.folder)) == [
        *("evaluations", "log.txt", "result.json", "spec.json")
    ]


def test_all_weights(tmp_path):
    search = course(tmp_path, max_trials=9, keep_all_weights=True)
    evaluate = fake_evaluation(search)

    def with_weights(number):
        open(search.candidate(number).student, "w").close()
        evaluate(number)

    Worker(search, "a", with_weights, poll=0.01).run()
    assert weights_of(search) == set(range(9))


def test_nothing_is_removed_while_a_parent_is_being_chosen(tmp_path):
    search = course(tmp_path, generation=0, top_k=1, max_trials=9)
    evaluate = fake_evaluation(search)
    for number in range(4):
        search.journal.begin(number, "a")
        search.candidate(number).write_spec(search.proposal(number, search.journal.trials()))
        open(search.candidate(number).student, "w").close()
        evaluate(number)
        search.journal.complete(number, search.candidate(number).result()["score"])
    search.journal.begin(4, "b")
    search.clean()
    assert weights_of(search) == {0, 1, 2, 3}
    search.candidate(4).write_spec(search.proposal(4, search.journal.trials()))
    search.clean()
    assert len(weights_of(search)) < 4


def test_missing_result(tmp_path):
    search = run_alone(tmp_path, max_trials=3)
    os.remove(search.candidate(1).path("result.json"))
    with pytest.raises(ValueError, match="0001/result.json is missing, although the journal"):
        Candidate(str(tmp_path), 1).outcome()
