#!/usr/bin/env python
"""Parameters, FLOPs, latency and peak memory of detectors at inference, by group of modules.

    python tools/analyze_model.py --config-file configs/teachers/gfl_r50_1x.yaml
    python tools/analyze_model.py --config-file teacher.yaml --weights teacher.pth \\
        --config-file student.yaml --weights output --output cost.json --image-size 800 1344

Only what inference needs is counted: a detector that has parts for training only is measured as it
is deployed, and no teacher is built. --weights may be given once for each --config-file, in the
same order ("" for random weights); weights change how many boxes go through the last steps.

Groups: the children of the detector; a backbone is split into its bottom_up and the pyramid above
it; "rest" is what the detector does itself: normalisation, choice and decoding of boxes, NMS.

FLOPs are multiply-adds, one each, as fvcore counts them: convolutions, linear maps, matrix
products, and norms and interpolation by number of elements. Pointwise operations, RoIAlign and NMS
count nothing. They are those of one image of noise, of --image-size pixels (default: the test size
of each config), padded as the detector pads it.

Latency is that of one image at a time, from the uint8 image to the boxes: percentiles over --rounds
rounds after --warmup rounds that are not counted; several detectors run in turn within a round.
That of the groups comes from passes of their own, in which a GPU is waited for around each group.

Peak memory is measured in a fresh process for each detector, in its first pass: on a GPU what the
allocator handed out at most, on the CPU the largest resident set minus that before the detector was
built, both with the weights. A group's memory is by how much the peak rose while the group ran.
"""

import argparse
import functools
import json
import os
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from kd_d2 import analysis
from kd_d2.checkpoint import atomic_write
from kd_d2.engine.main import build_config, short_errors
from kd_d2.export import find_checkpoint

MIB = 2**20
PERCENTILES = ("p50", "p90", "p99")


class Subject(NamedTuple):
    """A detector that is measured.

    Attributes:
        title: unique among all.
        config_file, weights: as given; weights may be empty.
        opts: overrides of config keys.
        cfg: the config.
        image_size: height and width in pixels.
    """

    title: str
    config_file: str
    weights: str
    opts: List[str]
    cfg: CfgNode
    image_size: Tuple[int, int]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        action="append",
        required=True,
        metavar="YAML",
        help="may be given several times, also the same one",
    )
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="FILE_OR_FOLDER",
        help="checkpoint, or output folder of a run; once for each --config-file, or never",
    )
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels"
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help="timed detections; 0: no latency (default: 20)"
    )
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (default: 3)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--output", default="", metavar="JSON", help="file for all figures")
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides of config keys, separated by spaces, after all options; for all detectors",
    )
    return parser


def subjects(args: argparse.Namespace) -> List[Subject]:
    """What the command line names.

    Raises:
        ValueError, FileNotFoundError: an option or a file is wrong.
    """
    if args.weights and len(args.weights) != len(args.config_file):
        raise ValueError(
            f"{len(args.config_file)} --config-file need as many --weights (or none), got "
            f'{len(args.weights)}; "" stands for random weights'
        )
    if args.image_size and min(args.image_size) < 1:
        raise ValueError(f"--image-size must be positive, got {args.image_size}")
    if args.rounds < 0 or args.warmup < 0 or args.threads < 0:
        raise ValueError("--rounds, --warmup and --threads must not be negative")
    folder = os.path.dirname(os.path.abspath(args.output))
    if args.output and not os.path.isdir(folder):
        raise ValueError(f"the folder of --output does not exist: {folder}")
    result: List[Subject] = []
    weights = [find_checkpoint(path) for path in args.weights]
    for file, path in zip(args.config_file, weights or [""] * len(args.config_file)):
        # a network may be described in its checkpoint
        opts = [*args.opts, *(("MODEL.WEIGHTS", path) if path else ())]
        cfg = build_config(file, opts)
        size = tuple(args.image_size or analysis.image_size_of(cfg))
        taken = {subject.title for subject in result}
        result.append(Subject(_title(file, path, taken), file, path, opts, cfg, size))
    return result


def _title(config_file: str, weights: str, taken) -> str:
    title = os.path.splitext(os.path.basename(config_file))[0]
    if title in taken and weights:
        title = f"{title} with {os.path.basename(weights)}"
    number, unique = 1, title
    while unique in taken:
        number += 1
        unique = f"{title} ({number})"
    return unique


@torch.no_grad()
def measure(subject: Subject, model: nn.Module) -> Dict[str, Any]:
    """Everything but time and memory."""
    batch = analysis.random_batch(1, *subject.image_size, num_classes=1)
    groups = analysis.module_groups(model)
    counts = analysis.flop_analysis(model, batch)
    total = counts.total()
    flops = analysis.by_group(groups, analysis.flops_by_module(counts), total)
    parameters = analysis.parameters_by_group(model, groups)
    padded: List[int] = []
    hook = model.backbone.register_forward_pre_hook(
        lambda module, inputs: padded.extend(inputs[0].shape[-2:])
    )
    detections = len(model(batch)[0]["instances"])
    hook.remove()
    return {
        "title": subject.title,
        "config": subject.config_file,
        "weights": subject.weights,
        "architecture": type(model).__name__,
        "image size": list(subject.image_size),
        "padded": padded,
        "detections": detections,
        "parameters": sum(parameters.values()),
        "flops": total,
        "groups": {
            name: {"parameters": parameters[name], "flops": flops[name]} for name in parameters
        },
    }


@torch.no_grad()
def add_latency(results: List[Dict[str, Any]], models: Dict[str, nn.Module], args) -> None:
    """Milliseconds of all detectors and their groups, measured in turn."""
    parts, watched = {}, {}
    for result in results:
        title = result["title"]
        model = models[title]
        batch = analysis.random_batch(1, *result["image size"], num_classes=1)
        watched[title] = _Watched(model, batch)
        parts[title] = functools.partial(model, batch)
        parts[title, "groups"] = watched[title].run
    bar = functools.partial(tqdm, desc="latency", unit="round", disable=None)
    times = analysis.interleaved(parts, args.rounds, args.warmup, progress=bar)
    for result in results:
        title = result["title"]
        result["latency"] = _milliseconds(times[title])
        passes = zip(watched[title].passes[args.warmup :], times[title, "groups"])
        seconds = [analysis.by_group(watched[title].groups, *one) for one in passes]
        for name, group in result["groups"].items():
            group["latency"] = _milliseconds([one[name] for one in seconds])


class _Watched:
    """Passes of which the time of every group is noted."""

    def __init__(self, model: nn.Module, batch):
        self.groups = analysis.module_groups(model)
        self.passes: List[Dict[str, float]] = []
        self._model, self._batch = model, batch

    def run(self) -> None:
        paths = [group.path for group in self.groups]
        with analysis.GroupTimer(self._model, paths) as timer:
            self._model(self._batch)
        self.passes.append(timer.totals)


def _milliseconds(seconds: List[float]) -> Dict[str, float]:
    values = [1e3 * x for x in seconds]
    return {**analysis.percentiles(values), "mean": sum(values) / len(values), "min": min(values)}


def add_memory(result: Dict[str, Any], subject: Subject, threads: int) -> None:
    """Peak memory in MiB, measured in another process."""
    build = functools.partial(build_config, subject.config_file, subject.opts)
    memory = analysis.peak_memory(build, subject.image_size, threads)
    result["memory"] = {"peak": memory.peak / MIB, "weights": memory.model / MIB}
    for name, group in result["groups"].items():
        group["memory"] = memory.groups[name] / MIB


# ------------------------------------------------------------------------------------ reports
def group_table(result: Dict[str, Any]) -> str:
    """One detector: a row for each group and one for the whole."""
    whole = {**result, "memory": result.get("memory", {}).get("peak")}
    rows = [_row(name, group) for name, group in result["groups"].items()]
    return _table("group", [*rows, _row("whole detector", whole)])


def comparison_table(results: List[Dict[str, Any]]) -> str:
    """All detectors; the last column is the median latency relative to the first."""
    first = results[0].get("latency")
    rows = []
    for result in results:
        row = _row(result["title"], {**result, "memory": result.get("memory", {}).get("peak")})
        ratio = f"{result['latency']['p50'] / first['p50']:.3f}" if first else ""
        rows.append([*row, ratio])
    return _table("detector", rows, "p50, ratio")


def _row(name: str, entry: Dict[str, Any]) -> List[str]:
    latency, memory = entry.get("latency"), entry.get("memory")
    return [
        name,
        f"{entry['parameters'] / 1e6:.3f}",
        f"{entry['flops'] / 1e9:.3f}",
        *(f"{latency[p]:.1f}" if latency else "" for p in PERCENTILES),
        "" if memory is None else f"{memory:.1f}",
    ]


def _table(first: str, rows: List[List[str]], *more: str) -> str:
    header = [first, "parameters, M", "FLOPs, G", *(f"{p}, ms" for p in PERCENTILES)]
    header += ["peak memory, MiB", *more]
    align = ("left", *["right"] * (len(header) - 1))
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align)


def describe(result: Dict[str, Any]) -> str:
    size, padded = ("x".join(map(str, result[key])) for key in ("image size", "padded"))
    return (
        f"{result['title']}: {result['architecture']}, one image of {size} pixels (height x width, "
        f"padded to {padded}), weights {result['weights'] or 'random'}, "
        f"{result['detections']} detections"
    )


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = build_parser().parse_args(arguments)
    models = {}
    with short_errors():
        wanted = subjects(args)
        if args.threads:
            torch.set_num_threads(args.threads)
        for subject in wanted:
            torch.manual_seed(0)
            models[subject.title] = analysis.deployed(subject.cfg, subject.weights)
    results = [measure(subject, models[subject.title]) for subject in wanted]
    if args.rounds:
        add_latency(results, models, args)
    models.clear()
    if not args.no_memory:
        for result, subject in zip(results, tqdm(wanted, desc="memory", disable=None)):
            add_memory(result, subject, args.threads)
    environment = {
        "device": analysis.device_name(wanted[0].cfg.MODEL.DEVICE),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "warmup": args.warmup,
        "flops": "multiply-adds, as fvcore counts them",
        "batch": 1,
    }
    for result in results:
        print(f"{describe(result)}\n\n{group_table(result)}\n")
    if len(results) > 1:
        print(f"{comparison_table(results)}\n")
    print(
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}; "
        f"batch 1, {args.rounds} rounds after {args.warmup}; FLOPs are {environment['flops']}"
    )
    if args.output:
        with atomic_write(args.output) as file:
            content = {"environment": environment, "detectors": results}
            file.write(json.dumps(content, indent=1).encode() + b"\n")
        print(f"written: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
