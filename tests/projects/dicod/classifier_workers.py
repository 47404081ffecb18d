"""What the two processes of ``test_train_classifier.py`` do. Not a test itself.

``python classifier_workers.py FOLDER`` starts two gloo processes; results are left in FOLDER.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist


def gradients(crops, labels, distributed):
    """Losses and gradients of one step with the statistics of batch norm kept fixed."""
    from detectron2.engine import create_ddp_model
    from detectron2.utils.events import EventStorage

    from tests.projects.dicod.crop_cases import small_classifier

    torch.manual_seed(0)
    model = small_classifier(losses=("cross_entropy", "focal")).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    wrapped = model
    if distributed:
        wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    with EventStorage():
        losses = wrapped({"crops": crops, "labels": labels})
        sum(losses.values()).backward()
    return {
        "losses": {name: value.item() for name, value in losses.items()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
    }


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    crops = torch.rand(3, 3, 32, 32, generator=generator) * 255
    return crops, torch.randint(0, 3, (3,), generator=generator)


def trained(folder, output, **changes):
    from tests.projects.dicod.test_train_classifier import train

    name = (folder / "name.txt").read_text()
    trainer = train(folder, name, output=output, **changes)
    return {
        "parameters": {k: v.detach().clone() for k, v in trainer.student.named_parameters()},
        "buffers": {k: v.clone() for k, v in trainer.student.named_buffers()},
        "curve": trainer.curve,
        "results": trainer._last_eval_results,
    }


def work(folder):
    rank = dist.get_rank()
    torch.set_num_threads(1)
    exec((folder / "data.py").read_text(), {})
    results = {"step": gradients(*batch(rank), distributed=True)}
    results["whole"] = trained(folder, "whole")
    trained(folder, "parts", stop_at=3)
    results["resumed"] = trained(folder, "parts", resume=True)
    torch.save(results, folder / f"rank{rank}.pth")


if __name__ == "__main__":
    # the processes started below import this file by its name in the package
    from kd_d2.engine.launch import launch
    from tests.distributed import workers
    from tests.projects.dicod import classifier_workers

    launch(classifier_workers.work, workers.options(), (Path(sys.argv[1]),), device="cpu")
