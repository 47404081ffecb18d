#!/usr/bin/env python
"""Search a detector, by any number of workers that share the folder OUTPUT_DIR.

worker --config-file YAML --worker-id NAME [--num-gpus K] OUTPUT_DIR FOLDER
    Evaluate trials until the search is over. A killed worker goes on when it is started again.
status OUTPUT_DIR FOLDER
    Print progress, all trials and workers; write the page search.html.
reclaim --worker-id NAME OUTPUT_DIR FOLDER
    Free the trial that a worker had begun which will not be started again.
pareto OUTPUT_DIR FOLDER
    Print and draw the Pareto front of AP and complexity.
export [--trial N] --output FOLDER OUTPUT_DIR FOLDER
    Write a trial's detector for train_net.py --eval-only, and finetune.yaml; default: the best.
prune --config-file YAML --percent P | --gmacs G [--size W H] | --like FILE --output FOLDER
      MODEL.WEIGHTS FILE
    Remove channels at once: a part of them, or down to a complexity of the backbone, also to that
    of another student's checkpoint.
evaluate
    One trial, in the process that a worker starts for it.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import threading
import time
from typing import Optional, Sequence

from detectron2.config import CfgNode
from detectron2.engine.defaults import default_argument_parser
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from kd_d2.checkpoint import atomic_write, load_weights
from kd_d2.data import check_datasets, register_all
from kd_d2.engine import KDTrainer, launch
from kd_d2.engine.main import build_config, import_components, short_errors
from kd_d2.export import export_student
from kd_d2.projects.jointdetnas.presets import config_text
from kd_d2.projects.jointdetnas.search.analyses import lineage
from kd_d2.projects.jointdetnas.search.commands import (
    build_course,
    choose_trial,
    pareto_table,
    reclaim,
    status,
)
from kd_d2.projects.jointdetnas.search.course import Course
from kd_d2.projects.jointdetnas.search.evaluation import evaluate, prepare, resolutions
from kd_d2.projects.jointdetnas.search.exporting import finetune_config, trial_config
from kd_d2.projects.jointdetnas.search.file_lock import FileLock
from kd_d2.projects.jointdetnas.search.page import report, write_page
from kd_d2.projects.jointdetnas.search.pruning import backbone_macs, prune, prune_to
from kd_d2.projects.jointdetnas.search.results import results
from kd_d2.projects.jointdetnas.search.settings import open_folder, read_config
from kd_d2.projects.jointdetnas.search.students import stored_architecture, write_student
from kd_d2.projects.jointdetnas.search.worker import EvaluationError, Worker
from kd_d2.projects.jointdetnas.surgery import bottom_up_of

logger = logging.getLogger("kd_d2.search_net")

# Seconds between two looks whether the worker that started an evaluation is still there.
WATCH = 1.0


# -------------------------------------------------------------------------------------- worker
def search_config(args: argparse.Namespace) -> CfgNode:
    """Config of the search with its data sets; whatever is wrong is found here.

    Raises:
        ValueError, FileNotFoundError: what it is.
    """
    cfg = build_config(args.config_file, args.opts)
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"DATASETS.TEST of a search must be one data set, got {list(cfg.DATASETS.TEST)}"
        )
    resolutions(cfg)
    register_all(cfg)
    check_datasets(cfg)
    return cfg


def work(args: argparse.Namespace) -> None:
    cfg = search_config(args)
    course = build_course(cfg, create=True)
    open_folder(cfg)
    setup_logger(os.path.join(cfg.OUTPUT_DIR, "workers", f"{args.worker_id}.log"), name="kd_d2")
    Worker(
        course,
        args.worker_id,
        lambda number: evaluate_in_process(args, course, number),
        attempts=cfg.SEARCH.ATTEMPTS,
        poll=args.poll,
        report=lambda: report(course),
    ).run()
    logger.info("the search is over")


def evaluate_in_process(args: argparse.Namespace, course: Course, number: int) -> None:
    """Evaluate a trial in a process of its own, which may fail without harm to the worker.

    Raises:
        EvaluationError: it failed; with the last line of its log.
    """
    candidate = course.candidate(number)
    logger.info(f"trial {number}: {candidate.spec()}")
    command = [sys.executable, os.path.abspath(__file__), "evaluate", "--trial", str(number)]
    command += ["--parent", str(os.getpid()), "--num-gpus", str(args.num_gpus)]
    command += ["--dist-url", args.dist_url, "--config-file", args.config_file, *args.opts]
    with open(candidate.log, "ab") as log:
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    if code:
        raise EvaluationError(f"{_last_line(candidate.log)} (exit code {code}, {candidate.log})")


def _last_line(path: str) -> str:
    with open(path, errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1] if lines else "no output"


# ------------------------------------------------------------------------------------ evaluate
def evaluate_trial(args: argparse.Namespace) -> None:
    """What a worker starts for every trial."""
    leave_with(args.parent)
    cfg = search_config(args)
    course = build_course(cfg)
    number = int(args.trial)
    # an evaluation whose worker was killed leaves a moment later than its worker
    with FileLock(course.candidate(number).path("evaluation.lock")):
        prepare(cfg, course, number)
        launch(evaluate_rank, args, main_args=(args,), device=cfg.MODEL.DEVICE)


def evaluate_rank(args: argparse.Namespace) -> None:
    """The same on each rank; after :func:`prepare`."""
    cfg = search_config(args)
    course = build_course(cfg)
    number = int(args.trial)
    evaluate(cfg, prepare(cfg, course, number), course.candidate(number), KDTrainer)


def leave_with(parent: int) -> None:
    """End this process when the one that started it is gone; it would race with its successor."""
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------- what came out of it
def course_of(args: argparse.Namespace) -> Course:
    """The search in the folder that OUTPUT_DIR names."""
    values = dict(zip(args.opts[0::2], args.opts[1::2]))
    if "OUTPUT_DIR" not in values:
        raise ValueError(f"{args.command} needs the folder of the search: OUTPUT_DIR <folder>")
    import_components()
    return build_course(read_config(values["OUTPUT_DIR"]))


def print_status(args: argparse.Namespace) -> None:
    course = course_of(args)
    write_page(course)
    print(status(course))


def reclaim_trials(args: argparse.Namespace) -> None:
    numbers = reclaim(course_of(args), args.worker_id)
    freed = ", ".join(map(str, numbers)) or "none"
    print(f"trials that any worker may take over now: {freed}")


def print_pareto(args: argparse.Namespace) -> None:
    course = course_of(args)
    table = pareto_table(course)
    with atomic_write(os.path.join(course.folder, "pareto.md")) as file:
        file.write(f"{table}\n".encode())
    write_page(course)
    print(table)


def export(args: argparse.Namespace) -> None:
    course = course_of(args)
    number = choose_trial(course, args.trial)
    candidate = course.candidate(number)
    trained = lineage(results(course, course.journal.trials()), number)
    result = {
        **candidate.result(),
        "lineage": [step["number"] for step in trained],
        "lineage_iterations": sum(step["iterations"] for step in trained),
    }
    cfg = read_config(course.folder)
    register_all(cfg)
    written = export_student(trial_config(candidate), candidate.student, args.output)
    path = os.path.join(args.output, "finetune.yaml")
    with atomic_write(path) as file:
        file.write(finetune_config(cfg, candidate, written.files[0], args.output).dump().encode())
    with atomic_write(os.path.join(args.output, "result.json")) as file:
        file.write(json.dumps(result, indent=1).encode())
    width, height = result["size"]
    print(
        f"trial {number}: AP {result['AP']:.2f} at {width}x{height}, trained "
        f"for {result['lineage_iterations']} iterations in the search, by trials "
        f"{', '.join(map(str, result['lineage']))}"
    )
    print("\n".join(f"wrote {file}" for file in [*written.files, path]))


# --------------------------------------------------------------------------------------- prune
def prune_checkpoint(args: argparse.Namespace) -> None:
    """Tables 2 and 5: one-shot pruning; the written config trains with train_net.py."""
    if sum(map(bool, (args.percent, args.gmacs, args.like))) != 1:
        raise ValueError("prune needs one of --percent, --gmacs and --like")
    if os.path.exists(os.path.join(args.output, "last_checkpoint")):
        raise ValueError(f"--output must be a folder without checkpoints, got '{args.output}'")
    cfg = build_config(args.config_file, args.opts).clone()
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    register_all(cfg)
    model = build_model(cfg)
    load_weights(model, cfg.MODEL.WEIGHTS, cfg.KD.ALLOW_UNSAFE_LOAD)
    size = tuple(args.size or cfg.SEARCH.SCORE.BASE_SIZE)
    node = cfg.SEARCH.CHANNEL_PRUNING
    floors = {"floor": node.FLOOR, "min_channels": node.MIN_CHANNELS}
    if args.percent:
        pruned = prune(model, args.percent, **floors)
    else:
        other = stored_architecture(args.like) if args.like else None
        target = backbone_macs(other, size) if other else round(args.gmacs * 1e9)
        pruned = prune_to(model, target, size, **floors)
    architecture = bottom_up_of(pruned).architecture
    os.makedirs(args.output, exist_ok=True)
    weights = os.path.join(args.output, "model_init.pth")
    write_student(pruned, weights, cfg)
    cfg.defrost()
    cfg.MODEL.WEIGHTS = weights
    cfg.MODEL.MORPH_RESNET.ENCODING = config_text(architecture)
    cfg.OUTPUT_DIR = os.path.join(args.output, "run")
    with atomic_write(os.path.join(args.output, "config.yaml")) as file:
        file.write(cfg.dump().encode())
    before = bottom_up_of(model).architecture
    channels = before.num_rankable_channels, architecture.num_rankable_channels
    macs = [backbone_macs(a, size) / 1e9 for a in (before, architecture)]
    print(
        f"channels {channels[0]:,} -> {channels[1]:,}, backbone {macs[0]:.4g} -> {macs[1]:.4g} "
        f"GMAC at {size[0]}x{size[1]}: {args.output}/config.yaml"
    )


# ---------------------------------------------------------------------------------------- main
COMMANDS = {
    "worker": work,
    "evaluate": evaluate_trial,
    "status": print_status,
    "reclaim": reclaim_trials,
    "pareto": print_pareto,
    "export": export,
    "prune": prune_checkpoint,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {name: commands.add_parser(name) for name in COMMANDS}
    _add_worker_options(parsers["worker"], parsers["evaluate"])
    parsers["worker"].add_argument("--worker-id", required=True, metavar="NAME")
    parsers["worker"].add_argument(
        "--poll", type=float, default=5.0, help="seconds between looks for work"
    )
    parsers["evaluate"].add_argument("--trial", required=True, metavar="N")
    parsers["evaluate"].add_argument("--parent", type=int, default=0, metavar="PID")
    parsers["reclaim"].add_argument("--worker-id", required=True, metavar="NAME")
    parsers["export"].add_argument("--trial", default="best", metavar="N", help="number or 'best'")
    parsers["prune"].add_argument("--config-file", required=True, metavar="YAML")
    parsers["prune"].add_argument("--percent", type=float, default=0.0, help="of channels, 0 to 1")
    parsers["prune"].add_argument(
        "--gmacs", type=float, default=0.0, help="of the backbone, at most"
    )
    parsers["prune"].add_argument(
        "--like", default="", metavar="FILE", help="checkpoint of a student that costs as much"
    )
    parsers["prune"].add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(),
        metavar=("WIDTH", "HEIGHT"),
        help="that they are counted at (default: SEARCH.SCORE.BASE_SIZE)",
    )
    for name in ("export", "prune"):
        parsers[name].add_argument("--output", required=True, metavar="FOLDER")
    for command in parsers.values():
        command.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser


def _add_worker_options(*parsers: argparse.ArgumentParser) -> None:
    for parser in parsers:
        parser.add_argument("--config-file", required=True, metavar="YAML", help="of the search")
        parser.add_argument("--num-gpus", type=int, default=1, help="for one trial")
        parser.add_argument(
            "--dist-url",
            default=default_argument_parser().get_default("dist_url"),
            help="where processes with several GPUs meet, as for train_net.py",
        )
        # one machine; several of them have a worker each
        parser.set_defaults(num_machines=1, machine_rank=0)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = build_parser().parse_args(argv)
    with short_errors():
        COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
