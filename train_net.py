#!/usr/bin/env python
"""Train or evaluate a detector, with or without a teacher.

The options are those of Detectron2's ``tools/train_net.py``; ``torchrun train_net.py ...`` works
as well. Without a GPU everything runs on the CPU (``--num-gpus`` is then a number of processes).
"""

from detectron2.engine import default_argument_parser

from kd_d2.engine.launch import launch
from kd_d2.engine.main import check, run, short_errors


def cli() -> None:
    args = default_argument_parser().parse_args()
    with short_errors():
        # a mistake in the config is reported here, once, and before any process is started
        cfg = check(args)
    launch(run, args, main_args=(args,), device=cfg.MODEL.DEVICE)


if __name__ == "__main__":
    cli()
