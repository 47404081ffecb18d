"""Averages over processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd_d2.modeling.layers import reduce_mean

ROOT = Path(__file__).parents[3]


def test_in_one_process_it_is_the_detached_identity():
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(reduce_mean(x), x) and not reduce_mean(x).requires_grad


def _reduce_on_rank(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=2
    )
    local = torch.tensor([1.0 + rank, 10.0 * rank])
    torch.save((reduce_mean(local), local), folder / f"rank{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_in_two_processes_both_get_the_mean_and_keep_their_input(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), tmp_path], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    results = [torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2)]
    assert [mean.tolist() for mean, _ in results] == [[1.5, 5.0]] * 2
    assert [local.tolist() for _, local in results] == [[1.0, 0.0], [2.0, 10.0]]


if __name__ == "__main__":
    _reduce_on_rank(int(sys.argv[1]), Path(sys.argv[2]))
