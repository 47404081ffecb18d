"""The command line, in processes of its own."""

import json
import os
import time

import pytest
import torch
from detectron2.engine import default_argument_parser

from tests.engine.support import (
    ROOT,
    USER_MODULE,
    assert_same_state,
    data_module,
    run_program,
    teacher_keys,
    write_yaml,
)
from tests.fixtures import registered_toy_dataset, tiny_cfg

TRAIN_NET = ROOT / "train_net.py"
PERIOD, LAST = 3, 7

# Named in KD.IMPORTS; what it does is chosen by the environment variable SABOTAGE.
SABOTAGE = """
import os
import signal

from detectron2.utils import comm

from kd_d2.baselines import PKD

kind = os.environ.get("SABOTAGE")
compute, fsync, sizes = PKD.compute, os.fsync, []


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def compute_or_die(self, ctx):
    if ctx.iteration == 4 and comm.get_rank() == 1:
        die()
    return compute(self, ctx)


def die_while_writing(descriptor):
    size = os.fstat(descriptor).st_size
    if size > 1_000_000:  # a checkpoint
        sizes.append(size)
        if len(sizes) == 2:
            os.ftruncate(descriptor, size // 2)
            die()
    fsync(descriptor)


if kind == "rank 1":
    PKD.compute = compute_or_die
elif kind == "writing":
    os.fsync = die_while_writing
"""


@pytest.fixture
def config(tmp_path):
    """A function that writes a run's config into a folder and returns its path."""
    teacher_keys(tmp_path, "RetinaNet", **{"MODEL.RESNETS.NORM": "BN"})
    with registered_toy_dataset(tmp_path, 6, size=(64, 96)) as name:
        (tmp_path / "sabotage.py").write_text(SABOTAGE)
        data_module(tmp_path / "data.py", name)

        def write(output, **changes):
            cfg = tiny_cfg(
                "RetinaNet",
                **{
                    "MODEL.RESNETS.NORM": "BN",
                    "DATASETS.TRAIN": (name,),
                    "DATASETS.TEST": (name,),
                    "INPUT.MIN_SIZE_TRAIN": (64, 96),
                    "INPUT.RANDOM_FLIP": "horizontal",
                    "SOLVER.MAX_ITER": LAST,
                    "SOLVER.CHECKPOINT_PERIOD": PERIOD,
                    "TEST.EVAL_PERIOD": 4,
                    "OUTPUT_DIR": str(tmp_path / output),
                },
            )
            keys = {
                "KD.ENABLED": True,
                "KD.DISTILLERS": ("CrossKD", "PKD", "Queue"),
                "KD.CROSSKD.POSITION": 1,
                "KD.PKD.SCHEDULE.WARMUP_ITERS": 5,
                "KD.TEACHER.CONFIG_FILE": "teacher.yaml",
                "KD.TEACHER.WEIGHTS": str(tmp_path / "teacher.pth"),
                "KD.IMPORTS": ("data.py", "sabotage.py", str(USER_MODULE)),
            }
            return write_yaml(tmp_path / f"{output}.yaml", cfg, **{**keys, **changes})

        yield write


def last_lines(folder):
    """The last line of each iteration in metrics.json, without what is measured."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    measured = ("time", "data_time", "rank_data_time", "eta_seconds")
    return {
        line["iteration"]: {k: v for k, v in line.items() if k not in measured and v == v}
        for line in lines
    }


def checkpoints(folder):
    return sorted(f.name for f in folder.glob("model_*.pth"))


@pytest.mark.slow
def test_killed_while_writing_a_checkpoint_and_resumed(config, tmp_path):
    """What another process resumes is what would have happened without the kill, bit by bit."""
    code, output = run_program([TRAIN_NET, "--config-file", config("whole")], timeout=300)
    assert code == 0, output[-3000:]
    assert "eta: 0:00:00  iter: 6" in output and "loss_kd/queue/queue" in output

    command = [TRAIN_NET, "--config-file", config("killed")]
    code, output = run_program(command, timeout=300, SABOTAGE="writing")
    folder = tmp_path / "killed"
    assert code == -9, output[-3000:]
    assert checkpoints(folder) == ["model_0000002.pth"]
    assert len(list(folder.glob(".model_0000005.pth.*"))) == 1  # half of it
    code, output = run_program([*command, "--resume"], timeout=300)
    assert code == 0, output[-3000:]
    assert "Starting training from iteration 3" in output
    assert not list(folder.glob(".model_*"))

    assert checkpoints(folder) == checkpoints(tmp_path / "whole")
    whole, resumed = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        for name in ("whole", "killed")
    )
    for state in (whole, resumed):
        for rank in state["trainer"]["rank_states"]["ranks"]:
            for name in ("time", "data_time", "rank_data_time"):
                rank["curves"].pop(name, None)
    assert_same_state(resumed, whole)
    assert last_lines(folder)[LAST - 1] == last_lines(tmp_path / "whole")[LAST - 1]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_killed_and_resumed_under_torchrun(config, tmp_path):
    config_file = config("two")
    started = time.time()
    code, output = run_program(
        [TRAIN_NET, "--num-gpus", 2, "--dist-url", "auto", "--config-file", config_file]
        + ["MODEL.DEVICE", "cpu"],
        timeout=300,
        SABOTAGE="rank 1",
    )
    assert code not in (0, None) and time.time() - started < 300
    last = output.strip().splitlines()[-1]
    assert "Starting training from iteration 0" in output
    assert "train_net.py: process 1 terminated with signal SIGKILL" in last or "closed" in output
    assert checkpoints(tmp_path / "two") == ["model_0000002.pth"]

    code, output = run_program(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, TRAIN_NET]
        + ["--resume", "--config-file", config_file],
        timeout=400,
    )
    assert code == 0, output[-3000:]
    assert "Starting training from iteration 3" in output
    assert "processes" not in output.split("Starting training from iteration 3")[1][:200]
    state = torch.load(tmp_path / "two" / "model_final.pth", weights_only=True)
    assert state["iteration"] == LAST - 1 and state["run_info"]["world_size"] == 2
    assert {4, LAST - 1} & set(last_lines(tmp_path / "two"))


def test_a_wrong_key_is_one_line(config):
    code, output = run_program(
        [TRAIN_NET, "--config-file", config("wrong"), "SOLVER.MAX_ITERS", "5"], timeout=120
    )
    lines = output.strip().splitlines()
    assert code == 1 and "Traceback" not in output
    assert "train_net.py: error: " in lines[-1] and "did you mean SOLVER.MAX_ITER" in lines[-1]
    assert len([line for line in lines if "error" in line]) == 1


def test_options_are_detectron2s():
    """Everything that Detectron2's tools/train_net.py understands."""
    args = default_argument_parser().parse_args(
        "--config-file a.yaml --resume --eval-only --num-gpus 2 --num-machines 2 --machine-rank 1 "
        "--dist-url tcp://127.0.0.1:1 SOLVER.BASE_LR 0.1".split()
    )
    assert (args.num_gpus, args.machine_rank, args.opts) == (2, 1, ["SOLVER.BASE_LR", "0.1"])
    assert os.access(TRAIN_NET, os.R_OK)
