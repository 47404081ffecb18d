"""What the two processes of the tests in this folder do. Not a test itself.

``python workers.py compare FOLDER`` and ``python workers.py failures FOLDER`` start two gloo
processes each; results are left in FOLDER.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

KINDS = ("raise", "exit", "kill")

CLS_ONLY = {
    "KD.DISTILLERS": ("CrossKD",),
    "KD.CROSSKD.BRANCHES": ("cls",),
    "KD.CROSSKD.ALIGN": "none",
    "KD.CROSSKD.POSITION": 1,
}
EVERYTHING = {
    "KD.DISTILLERS": ("CrossKD", "PKD", "Queue"),
    "KD.CROSSKD.POSITION": 1,
}


# ------------------------------------------------------------------------------- one batch
def batch(case, rank):
    """Images of a rank. Ground truth: 5 and 3 boxes; with "empty" the second rank has none."""
    from tests.fixtures import tiny_batch

    if case == "same":
        rank = 0
    counts = {0: (3, 2), 1: 0 if case == "empty" else (1, 2)}
    return tiny_batch(num_gt=counts[rank], seed=rank)


def gradients(changes, inputs, distributed):
    """Losses and gradients of one step of GFL with distillation."""
    from detectron2.engine import create_ddp_model
    from detectron2.utils.events import EventStorage

    from kd_d2.distillation import KDModel, build_distillers, build_tap
    from tests.fixtures import teacher_of, tiny_cfg, tiny_model

    # scores that are high enough for GFL's floor of 1 under the sum of its weights
    lively = {"MODEL.GFL.PRIOR_PROB": 0.5}
    cfg = tiny_cfg("GFL", **changes)
    student = tiny_model("GFL", seed=1, **lively)
    teacher = teacher_of(tiny_cfg("GFL", **lively), seed=2)
    torch.manual_seed(3)
    distillers, _ = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    model = KDModel(student=student, distillers=distillers, teacher=teacher).train()
    wrapped = model
    if distributed:
        wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
        inside = {id(t) for t in (*wrapped.parameters(), *wrapped.buffers())}
        theirs = teacher.model.state_dict(keep_vars=True).values()
        assert not inside & {id(t) for t in theirs}
    torch.manual_seed(4)
    with EventStorage():
        losses = wrapped(inputs)
        sum(losses.values()).backward()
    return {
        "losses": {name: value.item() for name, value in losses.items()},
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.requires_grad},
    }


# ---------------------------------------------------------------------------------- training
def train_config(folder, name, output, **changes):
    from tests.engine.support import THREE_DISTILLERS
    from tests.fixtures import tiny_cfg

    cfg = tiny_cfg(
        "RetinaNet",
        **{
            **THREE_DISTILLERS,
            "KD.TEACHER.CONFIG_FILE": str(folder / "teacher.yaml"),
            "KD.TEACHER.WEIGHTS": str(folder / "teacher.pth"),
            "DATASETS.TRAIN": (name,),
            "INPUT.MIN_SIZE_TRAIN": (64, 96),
            "INPUT.RANDOM_FLIP": "horizontal",
            "SOLVER.MAX_ITER": 4,
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "OUTPUT_DIR": str(folder / output),
            **changes,
        },
    )
    cfg.freeze()
    return cfg


def trained(trainer):
    """What a rank has after training."""
    return {
        "parameters": {k: v.detach() for k, v in trainer.kd_model.named_parameters()},
        "curve": trainer.curve,
        "loss_keys": sorted(k for k in trainer.storage.histories() if k.startswith("kd_raw")),
        "teacher": dict(trainer.teacher.model.state_dict()),
        "teacher_training": trainer.teacher.model.training,
    }


def training(folder, rank):
    """Train, stop and resume, and break on one rank."""
    from detectron2.utils.env import seed_all_rng

    from kd_d2.baselines import PKD
    from kd_d2.engine import KDTrainer
    from kd_d2.engine.resume import settle_scripted_losses
    from tests.engine.support import StopAt, registered_user_module, train
    from tests.fixtures import tiny_model

    # only the first of the runs below would see the focal loss unoptimised
    settle_scripted_losses(tiny_model("RetinaNet"))
    name = (folder / "name.txt").read_text()
    results = {}
    exec((folder / "data.py").read_text(), {})
    with registered_user_module():
        evaluated = {
            "DATASETS.TEST": (name,),
            "KD.EVAL_TEACHER": "sample",
            "KD.EVAL_TEACHER_IMAGES": 3,
            "TEST.EVAL_PERIOD": 3,
        }
        whole = train_config(folder, name, "whole", **evaluated)
        parts = train_config(folder, name, "parts", **evaluated)
        results["whole"] = trained(train(whole))
        train(parts, hooks=[StopAt(3)])
        results["resumed"] = trained(train(parts, resume=True))

        untrained = {"KD.TEACHER.WEIGHTS": "", "KD.TEACHER.ALLOW_UNTRAINED": True}
        seed_all_rng(100 + rank)
        trainer = KDTrainer(train_config(folder, name, "untrained", **untrained))
        results["untrained"] = dict(trainer.teacher.model.state_dict())

        compute = PKD.compute

        def broken(self, ctx):
            terms = compute(self, ctx)
            bad = rank == 1 and ctx.iteration == 2
            return {"feat": terms["feat"] * float("nan")} if bad else terms

        PKD.compute = broken
        before = {}

        def started(trainer):
            results["broken"] = before
            before["trainer"] = trainer

        try:
            train(train_config(folder, name, "broken"), started=started)
        except FloatingPointError as error:
            results["broken"] = str(error)
    return results


def compare(folder):
    rank = dist.get_rank()
    torch.set_num_threads(1)
    results = {
        case: gradients(CLS_ONLY, batch(case, rank), distributed=True)
        for case in ("different", "empty")
    }
    from tests.engine.support import registered_user_module

    with registered_user_module():
        results["same"] = gradients(EVERYTHING, batch("same", rank), distributed=True)
    results.update(training(folder, rank))
    torch.save(results, folder / f"rank{rank}.pth")


# ---------------------------------------------------------------------------------- failures
def fail(kind):
    """The second rank goes away while the first waits for it."""
    if dist.get_rank() == 1:
        time.sleep(0.5)
        if kind == "raise":
            raise RuntimeError("the reason of rank 1")
        if kind == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    time.sleep(600)


def failures(folder):
    from kd_d2.engine.launch import launch

    results = {}
    for kind in KINDS:
        started = time.time()
        end = "no error"
        try:
            launch(fail, options(), (kind,), device="cpu")
        except (Exception, SystemExit) as error:
            end = f"{type(error).__name__}: {error}"
        results[kind] = {"end": end, "seconds": time.time() - started}
    (folder / "failures.json").write_text(json.dumps(results))


def options():
    return argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")


if __name__ == "__main__":
    # the processes started below import this file by its name in the package
    from kd_d2.engine.launch import launch
    from tests.distributed import workers

    target = Path(sys.argv[2])
    if sys.argv[1] == "failures":
        workers.failures(target)
    else:
        with contextlib.suppress(KeyboardInterrupt):
            launch(workers.compare, options(), (target,), device="cpu")
