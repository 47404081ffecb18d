"""Normalisers of the refinement module's losses in two gloo processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


def _losses_on_rank(rank, folder):
    """Losses of this rank: 16 positives on the first, none on the second; as sums as well."""
    from tests.projects.mimicdet.refinement_cases import GROUND_TRUTH, pyramid, refinement, run

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=2
    )
    boxes = [GROUND_TRUTH, ()][rank]
    result = {}
    for name in ("num_pos", "fixed"):
        keys = (f"MODEL.MIMICDET.REFINE.{kind}_NORM" for kind in ("CLS", "REG"))
        module = refinement(lively=True, **{key: name for key in keys})
        losses = run(module, pyramid(), [boxes]).losses
        result[name] = {key: loss.item() for key, loss in losses.items()}
    torch.save(result, folder / f"rank{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_positives_are_averaged_over_processes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), tmp_path], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    # (16 + 0) / 2 positives on both, 256 anchors with "fixed"
    for losses in (first, second):
        for key in ("loss_refine_cls", "loss_refine_reg"):
            expected = losses["fixed"][key] * 256 / 8
            assert losses["num_pos"][key] == pytest.approx(expected, rel=1e-5)
    assert first["num_pos"]["loss_refine_reg"] > 0 == second["num_pos"]["loss_refine_reg"]


if __name__ == "__main__":
    _losses_on_rank(int(sys.argv[1]), Path(sys.argv[2]))
