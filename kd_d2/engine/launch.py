"""Start of one or several processes: Detectron2's launcher, or torchrun's environment."""

import contextlib
import os
import sys
from typing import Callable, Iterator, Tuple

import torch
import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

__all__ = ["launch", "started_by_torchrun"]


def started_by_torchrun() -> bool:
    """Whether torchrun (or a compatible launcher) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or (
        all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))
    )


def launch(main: Callable, args, main_args: Tuple = (), device: str = "cuda") -> None:
    """Run ``main(*main_args)`` in as many processes as ``args`` asks for.

    Under torchrun this process is already one of them. When one process fails or disappears, all
    end and this raises or exits with the failed one's error.

    Args:
        main: importable by name, because processes are started afresh.
        args: result of Detectron2's ``default_argument_parser``.
        device: MODEL.DEVICE. On "cpu" processes talk through gloo, also where there are GPUs.
    """
    on_cpu = torch.device(device).type == "cpu"
    if started_by_torchrun():
        _join_torchrun(use_gpu=not on_cpu and torch.cuda.is_available())
        _run_and_leave(main, *main_args)
        return
    several = args.num_machines * args.num_gpus > 1
    try:
        with _without_gpus() if several and on_cpu else contextlib.nullcontext():
            d2_launch(
                _run_and_leave,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, *main_args),
            )
    except ProcessExitedException as error:
        # it printed its reason itself, or was killed; where this process waited is of no interest
        sys.exit(f"{sys.argv[0]}: {error}")


def _run_and_leave(main: Callable, *main_args) -> None:
    """Run ``main`` in this process, then leave its process group.

    Python's exit with open gloo connections now and then aborts a process that has done its work.
    """
    main(*main_args)
    # not after an exception: it would wait for ranks that wait for this one
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _without_gpus() -> Iterator[None]:
    """Processes started in the block see no GPU; Detectron2 takes NCCL as soon as there is one."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _join_torchrun(use_gpu: bool) -> None:
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    if use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend="nccl" if use_gpu else "gloo")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    comm.create_local_process_group(local_size)
    comm.synchronize()
