"""What the projects' analysis commands have in common: options, config, data set, teacher."""

import argparse
import os
from typing import Tuple

from detectron2.config import CfgNode

from kd_d2.data import check_datasets, register_all
from kd_d2.distillation import Teacher, build_teacher

from .main import build_config

__all__ = ["add_titled", "parse", "parser", "prepare", "teacher_of", "titled_path"]


def parser(description: str, num_images: int) -> argparse.ArgumentParser:
    """The options of every command; :func:`parse` adds the last one.

    Args:
        description: docstring of the command.
        num_images: default of --num-images.
    """
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--config-file", required=True, metavar="YAML", help="config of the network"
    )
    result.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    result.add_argument(
        "--dataset", default="", metavar="NAME", help="data set (default: first of DATASETS.TEST)"
    )
    result.add_argument(
        "--images", default="", metavar="I,J,...", help="indices of images in the data set"
    )
    result.add_argument(
        "--num-images",
        type=int,
        default=num_images,
        metavar="N",
        help="without --images: so many, evenly spaced (default: %(default)s)",
    )
    return result


def add_titled(result: argparse.ArgumentParser, name: str, what: str, explanation: str) -> None:
    """Add a required option TITLE=PATH that may be given several times.

    Args:
        name: of the option, with its dashes.
        what: of the path, e.g. "FILE".
        explanation: what the path is.
    """
    result.add_argument(
        name,
        action="append",
        required=True,
        type=titled_path,
        metavar=f"TITLE={what}",
        help=f"{explanation}; may be given several times",
    )


def parse(result: argparse.ArgumentParser, arguments) -> argparse.Namespace:
    """Add the overrides of config keys, which take the rest of the command line, and parse."""
    result.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides of config keys, separated by spaces, after all options",
    )
    return result.parse_args(arguments)


def prepare(args: argparse.Namespace) -> Tuple[CfgNode, str]:
    """Return the config and the name of the data set, which exists; make the output folder.

    Raises:
        ValueError, FileNotFoundError: what is wrong with config or data.
    """
    cfg = build_config(args.config_file, args.opts)
    if args.dataset:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TEST = (args.dataset,)
        cfg.freeze()
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty; name a data set there or with --dataset")
    register_all(cfg)
    check_datasets(cfg, train=False)
    os.makedirs(args.output, exist_ok=True)
    return cfg, cfg.DATASETS.TEST[0]


def teacher_of(cfg: CfgNode) -> Teacher:
    """Return the config's teacher.

    Raises:
        ValueError: there is none, or it does not fit its weights.
    """
    if not cfg.KD.TEACHER.CONFIG_FILE:
        raise ValueError(
            "the config names no teacher (KD.TEACHER.CONFIG_FILE); give that of a distilled "
            "student, also for students that were trained without one"
        )
    return build_teacher(cfg)


def titled_path(text: str) -> Tuple[str, str]:
    """``TITLE=PATH`` of an option as two strings."""
    title, sign, path = text.partition("=")
    if not (title and sign and path):
        raise argparse.ArgumentTypeError(f"expected TITLE=PATH, got '{text}'")
    return title, path
