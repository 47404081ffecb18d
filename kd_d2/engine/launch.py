"""Start of one or several processes: Detectron2's launcher, or torchrun's environment."""

import os
from typing import Callable, Tuple

import torch
import torch.distributed as dist
from detectron2.engine import launch as d2_launch
from detectron2.utils import comm

__all__ = ["launch", "started_by_torchrun"]


def started_by_torchrun() -> bool:
    """Whether torchrun (or a compatible launcher) started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or (
        all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))
    )


def launch(main: Callable, args, main_args: Tuple = ()) -> None:
    """Run ``main(*main_args)`` in as many processes as ``args`` asks for.

    Under torchrun this process is already one of them. Without a GPU, processes use gloo.

    Args:
        args: result of Detectron2's ``default_argument_parser``.
    """
    if started_by_torchrun():
        _join_torchrun()
        try:
            main(*main_args)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return
    d2_launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=main_args,
    )


def _join_torchrun() -> None:
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend="nccl" if has_gpu else "gloo")
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    comm.create_local_process_group(local_size)
    comm.synchronize()
