"""GFL and ATSS in two processes against one process with both batches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from kd_d2.config import get_cfg

ROOT = Path(__file__).parents[3]


def _model(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / f"Base-{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL[name].NUM_CONVS = 1
    # The floor of 1 under the sum of GFL's weights applies to the mean over processes, so the two
    # runs are only alike where the sum is above 2: not with the low scores of a usual new head.
    cfg.MODEL[name].PRIOR_PROB = 0.5
    torch.manual_seed(0)
    return build_model(cfg)


def _samples():
    boxes = [[10, 10, 50, 60], [30, 20, 90, 90], [0, 0, 95, 95], [60, 5, 80, 25]]
    samples = []
    for index, rows in enumerate((boxes, boxes[1:], [], [])):
        generator = torch.Generator().manual_seed(index)
        instances = Instances((96, 96))
        instances.gt_boxes = Boxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(rows))
        pixels = torch.randint(0, 256, (3, 96, 96), generator=generator, dtype=torch.uint8)
        samples.append({"image": pixels, "instances": instances})
    return samples


def _gradients(name, samples):
    model = _model(name)
    with EventStorage():
        sum(model(samples).values()).backward()
    return {k: p.grad for k, p in model.named_parameters() if p.requires_grad}


def _gradients_of_rank(rank, name, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=2
    )
    # The second rank has no ground truth at all.
    gradients = _gradients(name, _samples()[2 * rank : 2 * rank + 2])
    torch.save(gradients, folder / f"rank{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["GFL", "ATSS"])
def test_two_processes_equal_one_with_both_batches(name, tmp_path):
    # Fresh interpreters: a fork of one in which autograd or OpenMP has run may hang.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), name, tmp_path], env=environment)
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    together = _gradients(name, _samples())
    assert first.keys() == second.keys() == together.keys()
    for key, gradient in together.items():
        mean = (first[key] + second[key]) / 2  # what DistributedDataParallel does
        scale = gradient.abs().max().item()
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=key)


if __name__ == "__main__":
    _gradients_of_rank(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
