"""Factors of a distiller by iteration, with numbers worked out by hand."""

import pytest
from detectron2.config import CfgNode

from kd_d2.config import add_schedule_config
from kd_d2.distillation import LossSchedule


def _factors(iterations, **kwargs):
    schedule = LossSchedule(**kwargs)
    return [schedule(i) for i in iterations]


def test_default_is_always_one():
    assert _factors([0, 1, 10**9]) == [1.0, 1.0, 1.0]


def test_interval_includes_its_start_and_excludes_its_end():
    assert _factors([0, 2, 3, 6, 7, 8], start_iter=3, end_iter=7) == [0, 0, 1, 1, 0, 0]


def test_warmup_grows_linearly_and_wastes_no_iteration():
    # start 2, three iterations of warm-up: 1/4, 2/4, 3/4, then 1
    factors = _factors(range(8), start_iter=2, warmup_iters=3)
    assert factors == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize(
    "decay, expected",
    [
        ("none", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        # (1 + cos(pi p)) / 2 at p = 0, 1/4, 1/2, 3/4
        ("cosine", [1.0, 0.8535533906, 0.5, 0.1464466094]),
    ],
)
def test_decay_runs_from_the_end_of_the_warmup_to_the_end(decay, expected):
    factors = _factors(range(1, 8), start_iter=2, end_iter=7, warmup_iters=1, decay=decay)
    assert factors == pytest.approx([0.0, 0.5] + expected + [0.0])


@pytest.mark.parametrize(
    "decay, expected",
    [
        # DeFeat's decays over 12 epochs
        ("linear", [1, 11 / 12, 10 / 12, 9 / 12, 8 / 12]),
        ("cosine", [1, 0.9829629131, 0.9330127019, 0.8535533906, 0.75]),
        (
            "updown",
            [1, 4 / 3, 5 / 3, 2, 16 / 9, 14 / 9, 12 / 9, 10 / 9, 8 / 9, 6 / 9, 4 / 9, 2 / 9],
        ),
    ],
)
def test_decays_over_twelve_epochs(decay, expected):
    found = _factors(range(len(expected)), end_iter=12, decay=decay)
    assert found == pytest.approx(expected)


def test_warmup_longer_than_the_interval_never_reaches_one():
    assert _factors(range(4), end_iter=3, warmup_iters=9) == pytest.approx([0.1, 0.2, 0.3, 0.0])


def test_a_factor_depends_on_the_iteration_only():
    schedule = LossSchedule(start_iter=1, end_iter=9, warmup_iters=2, decay="cosine")
    forward = [schedule(i) for i in range(10)]
    assert [schedule(i) for i in reversed(range(10))] == forward[::-1]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            {"decay": "exp"},
            "SCHEDULE.DECAY must be one of .*'cosine', 'linear', 'none', 'updown'.*'exp'",
        ),
        ({"start_iter": 5, "end_iter": 5}, r"END_ITER \(5\) must be larger than START_ITER \(5\)"),
        ({"start_iter": 5, "end_iter": 4}, r"END_ITER \(4\)"),
        ({"start_iter": -1}, "must not be negative, got -1 and 0"),
        ({"warmup_iters": -2}, "must not be negative, got 0 and -2"),
    ],
)
def test_impossible_schedules_name_key_and_values(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LossSchedule(**kwargs)


def _node(**values):
    node = CfgNode()
    add_schedule_config(node)
    node.SCHEDULE.merge_from_list([part for item in values.items() for part in item])
    return node.SCHEDULE


def test_from_node_reads_every_key():
    node = _node(START_ITER=10, END_ITER=30, WARMUP_ITERS=4, DECAY="linear")
    assert LossSchedule.from_node(node, max_iter=100) == LossSchedule(10, 30, 4, "linear")


def test_defaults_of_the_node_last_for_the_whole_run():
    schedule = LossSchedule.from_node(_node(), max_iter=100)
    assert [schedule(i) for i in (0, 99, 100)] == [1.0, 1.0, 0.0]


def test_end_of_the_run_bounds_the_decay_when_no_end_is_given():
    schedule = LossSchedule.from_node(_node(DECAY="linear"), max_iter=10)
    assert schedule(5) == 0.5


def test_start_after_the_end_of_the_run_is_allowed_and_never_reached():
    schedule = LossSchedule.from_node(_node(START_ITER=500), max_iter=100)
    assert not any(schedule(i) for i in range(100))


def test_an_end_before_the_start_in_the_node_is_refused():
    with pytest.raises(ValueError, match="END_ITER"):
        LossSchedule.from_node(_node(START_ITER=5, END_ITER=0), max_iter=100)
