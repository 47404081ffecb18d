"""Rows of two gloo processes: order, own columns, empty ranks, DDP's gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd_d2.projects.gdetkd.gather import gather_rows
from tests.projects.gdetkd import gather_workers
from tests.projects.gdetkd.loss_cases import naive_rows

ROOT = Path(__file__).parents[3]


def test_one_process_without_a_group():
    rows = torch.randn(3, 2, requires_grad=True)
    gathered = gather_rows(rows)
    assert torch.equal(gathered.rows, rows) and not gathered.rows.requires_grad
    assert (gathered.counts, gathered.rank) == ([3], 0)
    assert gather_rows(rows[:0]).counts == [0]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gather")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, gather_workers.__file__]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pth") for rank in range(2)]


@pytest.mark.distributed
def test_both_ranks_hold_the_same_queue(ranks):
    expected = [
        [1, 2, 3, 4],
        [7, 2, 3, 4, 5, 6],
        [7, 8, 3, 4, 5, 6],
        [7, 8, 9, 10, 11, 6],
        [7, 8, 9, 10, 11, 6],
    ]
    for rank in ranks:
        assert rank["queues"] == expected
        assert rank["counts"] == [[2, 2], [1, 2], [0, 1], [3, 0], [0, 0]]


@pytest.mark.distributed
def test_columns_of_each_rank(ranks):
    assert ranks[0]["columns"] == [[0, 1], [4], [], [2, 3, 4], []]
    assert ranks[1]["columns"] == [[2, 3], [5, 0], [1], [], []]


@pytest.mark.distributed
def test_types_are_kept(ranks):
    for rank in ranks:
        assert rank["half"].dtype == torch.float16
        assert rank["half"].tolist() == [[0.5, 0.5], [1.5, 1.5], [1.5, 1.5]]


@pytest.mark.distributed
def test_ddp_averages_what_each_rank_should_have(ranks):
    """Losses and gradients of every step by loops; some ranks have no RoI."""
    model = gather_workers.Losses()
    ckd = model.ckd
    history = torch.zeros(0, 4)
    for step in range(len(gather_workers.STEPS)):
        sent = [gather_workers.inputs(step, rank) for rank in range(2)]
        current = torch.cat([x["teacher"] for x in sent])
        before = history[max(0, len(history) + len(current) - gather_workers.SIZE) :]
        losses = []
        for rank, x in enumerate(sent):
            rows = naive_rows(
                ckd.adapter(x["student"]),
                x["teacher"],
                [b.tolist() for b in x["boxes"]],
                torch.cat([before, sent[1 - rank]["teacher"]]),
                ckd.projection,
                0.4,
                0.5,
            )
            sgfi = model.sgfi(x["student_rois"], x["teacher_rois"]).loss
            losses.append(rows.sum() / max(len(rows), 1) + sgfi)
            assert ranks[rank]["losses"][step] == pytest.approx(losses[rank].item(), rel=1e-4)
        names, parameters = zip(*model.named_parameters())
        gradients = torch.autograd.grad(sum(losses) / 2, parameters, allow_unused=True)
        for name, parameter, gradient in zip(names, parameters, gradients):
            expected = torch.zeros_like(parameter) if gradient is None else gradient
            for rank in ranks:
                actual = rank["gradients"][step][name]
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
            assert torch.equal(*[rank["gradients"][step][name] for rank in ranks])
        history = torch.cat([history, current])
    assert ranks[0]["losses"][1] > 0 == ranks[1]["losses"][1]
