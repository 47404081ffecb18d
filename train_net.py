#!/usr/bin/env python
"""Train or evaluate a detector, with or without a teacher.

The options are those of Detectron2's ``tools/train_net.py``; ``torchrun train_net.py ...`` works
as well. Without a GPU everything runs on the CPU (``--num-gpus`` is then a number of processes).
"""

import sys

from detectron2.engine import default_argument_parser

from kd_d2.engine.launch import launch
from kd_d2.engine.main import build_config, main


def cli() -> None:
    args = default_argument_parser().parse_args()
    try:
        # a mistake in the config is reported here, once, and before any process is started
        build_config(args.config_file, args.opts)
    except ValueError as error:
        sys.exit(f"{sys.argv[0]}: error: {error}")
    launch(main, args, main_args=(args,))


if __name__ == "__main__":
    cli()
