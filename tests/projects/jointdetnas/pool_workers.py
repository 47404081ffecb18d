"""What the two processes of ``test_train_pool.py`` do. Not a test itself.

``python pool_workers.py FOLDER`` starts two gloo processes; results are left in FOLDER.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist


def images(rank, size=(6, 8)):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, 5, *size, generator=generator) * (1 + rank) + rank


def normalised(x):
    """Output, gradients and statistics of an elastic batch norm with 5 of 7 channels."""
    from kd_d2.projects.jointdetnas.elastic_layers import ElasticBatchNorm2d

    norm = ElasticBatchNorm2d(7, synchronised=True)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 7))
        norm.bias.copy_(torch.linspace(-1, 1, 7))
    x.requires_grad_()
    y = norm(x)
    # summed over processes this is one loss
    (y.tanh() * torch.linspace(-1, 1, 5).view(1, 5, 1, 1)).sum().backward()
    return {
        "output": y.detach(),
        "input": x.grad,
        "weight": norm.weight.grad,
        "mean": norm.running_mean.clone(),
        "variance": norm.running_var.clone(),
    }


def trained(folder, output, **changes):
    from tests.projects.jointdetnas.test_train_pool import Subnets, train

    name, seen = (folder / "name.txt").read_text(), Subnets()
    trainer = train(folder, name, output=output, hooks=[seen], **changes)
    return {
        "parameters": {k: v.detach().clone() for k, v in trainer.model.named_parameters()},
        "buffers": {k: v.clone() for k, v in trainer.student.named_buffers()},
        "curve": trainer.curve,
        "subnets": seen.codes,
        "without_gradient": seen.without_gradient,
        "results": getattr(trainer, "_last_eval_results", None),
    }


def taught(folder):
    """Pyramid of a stored subnet of the pool, which one process makes and both read."""
    from kd_d2.distillation import build_teacher
    from kd_d2.projects.jointdetnas import teacher as module
    from tests.projects.jointdetnas.test_train_pool import SMALLEST, pool_cfg

    made, recalibrate = [], module.recalibrate
    module.recalibrate = lambda *args: made.append(1) or recalibrate(*args)
    cfg = pool_cfg(folder, (folder / "name.txt").read_text())
    cfg.KD.TEACHER.TYPE = "ElasticTeacher"
    cfg.KD.TEACHER.ELASTIC.SUBNET = SMALLEST
    cfg.KD.TEACHER.ELASTIC.STORE = str(folder / "teachers")
    try:
        teacher = build_teacher(cfg)
    finally:
        module.recalibrate = recalibrate
    with torch.no_grad():
        return teacher.model.backbone(torch.ones(1, 3, 64, 64))["p3"], len(made)


def work(folder):
    rank = dist.get_rank()
    torch.set_num_threads(1)
    exec((folder / "data.py").read_text(), {})
    sync = {"MODEL.RESNETS.NORM": "SyncBN", "MODEL.FPN.NORM": "SyncBN"}
    results = {
        "equal": normalised(images(rank)),
        "unequal": normalised(images(rank, (6, 8 - 3 * rank))),
        "taught": taught(folder),
        "whole": trained(folder, "whole", evaluate=True, **sync),
    }
    trained(folder, "parts", stop_at=3, **sync)
    results["resumed"] = trained(folder, "parts", resume=True, **sync)
    torch.save(results, folder / f"rank{rank}.pth")


if __name__ == "__main__":
    # the processes started below import this file by its name in the package
    from kd_d2.engine.launch import launch
    from tests.distributed import workers
    from tests.projects.jointdetnas import pool_workers

    launch(pool_workers.work, workers.options(), (Path(sys.argv[1]),), device="cpu")
