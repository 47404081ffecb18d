#!/usr/bin/env python
"""One HTML page about any number of runs, to look at and to send to others.

    python tools/report.py output/plain output/crosskd --output report.html
    python tools/report.py plain=output/run1 CrossKD=output/run2 --baseline plain --images 8

A run is the OUTPUT_DIR of train_net.py, of benchmarks/compare.py (one folder a method and seed) or
of a project's program. The page has AP with sizes and classes, the config keys in which the runs
differ, curves of all losses and distillation terms, types of errors (TIDE), parameters and
multiply-adds, and images with ground truth and the detections of every run. It is a single file
that needs no network. Nothing is trained; what a run does not have is computed from its stored
predictions or its checkpoint where that is possible, and named on the page where it is not.

Data sets are found below $DETECTRON2_DATASETS, as in training. Nothing is written but the page.
"""

import argparse
import logging
import os
import shlex
import sys
import time
from typing import List, Optional, Sequence, Tuple

from kd_d2.checkpoint import atomic_write
from kd_d2.engine.main import short_errors
from kd_d2.report import CostOptions, Options, Run, collect, read_runs, write_page


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder, or TITLE=FOLDER")
    parser.add_argument(
        "--output", default="report.html", metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument(
        "--baseline",
        metavar="RUN",
        help="title or folder of the run that differences refer to (default: the first; with "
        "'none' there are no differences)",
    )
    parser.add_argument("--title", default="Runs", help="heading of the page")
    parser.add_argument(
        "--images", type=int, default=6, metavar="N", help="with detections (default: %(default)s)"
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.3,
        metavar="S",
        help="weaker detections are hidden at first (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        default=None,
        metavar=("H", "W"),
        help="of the image that multiply-adds and latency are for (default: the size of the "
        "config's test images, square)",
    )
    parser.add_argument(
        "--latency", action="store_true", help="also measure the time per image on this machine"
    )
    return parser


def titled(runs: Sequence[str]) -> Tuple[List[str], Optional[List[str]]]:
    """Folders, and their titles if they are given.

    Raises:
        ValueError: some have a title and others none.
    """
    split = [("", run) if os.path.exists(run) else _split(run) for run in runs]
    titles = [title for title, _ in split]
    if any(titles) and not all(titles):
        raise ValueError("give every run a title (TITLE=FOLDER), or none of them")
    return [folder for _, folder in split], titles if all(titles) else None


def _split(text: str) -> Tuple[str, str]:
    title, sign, folder = text.partition("=")
    return (title, folder) if sign and title and folder else ("", text)


def baseline_of(name: Optional[str], runs: Sequence[Run]) -> Optional[int]:
    """Index of the run that is called so.

    Raises:
        ValueError: there is none.
    """
    if name is None:
        return 0 if len(runs) > 1 else None
    for index, run in enumerate(runs):
        if name == run.title or os.path.realpath(name) == os.path.realpath(run.folder):
            return index
    if name == "none":
        return None
    raise ValueError(f"--baseline {name} is none of the runs {[run.title for run in runs]}")


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments.

    Raises:
        ValueError, FileNotFoundError: which is wrong.
    """
    if args.images < 0:
        raise ValueError(f"--images must not be negative, got {args.images}")
    if not 0 <= args.score_threshold <= 1:
        raise ValueError(f"--score-threshold must be from 0 to 1, got {args.score_threshold}")
    if args.image_size is not None and min(args.image_size) < 32:
        raise ValueError(f"--image-size must be at least 32 32, got {args.image_size}")
    folder = os.path.dirname(os.path.abspath(args.output))
    if not os.path.isdir(folder) or os.path.isdir(args.output):
        raise FileNotFoundError(f"--output {args.output}: give a file in a folder that exists")
    return args


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(arguments)
    # what is wrong with a run is on the page
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    logging.getLogger("kd_d2.report").setLevel(logging.INFO)
    with short_errors():
        checked(args)
        runs = read_runs(*titled(args.runs))
        cost = CostOptions(args.image_size and tuple(args.image_size), args.latency)
        baseline = baseline_of(args.baseline, runs)
        options = Options(baseline, args.images, args.score_threshold, cost)
    report = collect(runs, options)
    command = shlex.join(["python", "tools/report.py", *(arguments or sys.argv[1:])])
    page = write_page(report, args.title, f"{time.strftime('%Y-%m-%d %H:%M')}, {command}")
    with atomic_write(args.output) as file:
        file.write(page.encode())
    for run in runs:
        for line in run.missing:
            print(f"{line.run}: no {line.part}: {line.reason}")
    print(f"written: {args.output} ({len(page.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
