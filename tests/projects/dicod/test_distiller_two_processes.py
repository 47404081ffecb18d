"""DICOD in two gloo processes: the mean of two single ones, also where one has no objects."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
CASES = {"SSD": ((3, 2), (1, 2)), "empty": ((3, 2), (0, 0)), "GeneralizedRCNN": ((2, 2), (0, 0))}


def result_of(case, rank, distributed):
    """Losses and gradients of one step with the batch of a rank."""
    from detectron2.engine import create_ddp_model

    from tests.projects.dicod.detectors import batch_for, detector, step

    student = "SSD" if case == "empty" else case
    model = detector(student)
    wrapped = model
    if distributed:
        wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    losses, _ = step(wrapped, batch_for(student, num_gt=CASES[case][rank], seed=rank))
    sum(losses.values()).backward()
    return {
        "losses": {name: value.item() for name, value in losses.items()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
    }


def _on_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=2
    )
    torch.save({case: result_of(case, rank, True) for case in CASES}, folder / f"rank{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dicod")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), folder], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=500) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pth") for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["SSD", "empty"])
def test_two_processes_are_the_mean_of_two_single_ones(ranks, case):
    """Divisors are those of a process: nothing is reduced but gradients."""
    alone = [result_of(case, rank, False) for rank in range(2)]
    for name, first in alone[0]["losses"].items():
        expected = [first, alone[1]["losses"][name]]
        assert [r[case]["losses"][name] for r in ranks] == pytest.approx(expected, rel=1e-5), name
    for name, gradient in alone[0]["gradients"].items():
        mean = (gradient + alone[1]["gradients"][name]) / 2
        scale = mean.abs().max().item()
        for rank in ranks:
            torch.testing.assert_close(
                rank[case]["gradients"][name], mean, rtol=1e-4, atol=1e-5 * scale + 1e-8, msg=name
            )


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_both_ranks_agree(ranks, case):
    first, second = (rank[case] for rank in ranks)
    assert list(first["losses"]) == list(second["losses"])
    terms = {name for name in first["losses"] if name.startswith("loss_kd/dicod/")}
    assert len(terms) == 3 and all(first["losses"][name] > 0 for name in terms)
    empty = sum(CASES[case][1]) == 0
    assert all((second["losses"][name] == 0) == empty for name in terms)
    for name, gradient in first["gradients"].items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
        assert torch.equal(gradient, second["gradients"][name]), name


if __name__ == "__main__":
    _on_rank(int(sys.argv[1]), Path(sys.argv[2]))
