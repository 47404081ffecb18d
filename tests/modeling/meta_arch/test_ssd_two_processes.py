"""SSD's losses in two processes are those of each process alone: its divisors are not reduced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

ROOT = Path(__file__).parents[3]


def _step(rank):
    """Losses and gradients of the batch of one rank; the second has fewer objects."""
    from tests.fixtures import tiny_batch, tiny_model

    model = tiny_model("SSD")
    num_gt = ((4, 3), (1, 0))[rank]
    with EventStorage():
        losses = model(tiny_batch(sizes=((128, 128),), num_gt=num_gt, seed=rank))
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"losses": {k: v.detach() for k, v in losses.items()}, "gradients": gradients}


def _run(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=2
    )
    torch.save(_step(rank), folder / f"rank{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_each_process_has_its_own_divisor(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), tmp_path], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    for rank in range(2):
        found, alone = torch.load(tmp_path / f"rank{rank}.pth"), _step(rank)
        for part in ("losses", "gradients"):
            assert found[part].keys() == alone[part].keys()
            for key, value in alone[part].items():
                torch.testing.assert_close(found[part][key], value, rtol=1e-4, atol=1e-5, msg=key)
        assert alone["losses"]["loss_ssd_cls"] > 0


if __name__ == "__main__":
    _run(int(sys.argv[1]), Path(sys.argv[2]))
