#!/usr/bin/env python
"""What the options that make a teacher cheaper save, and how much they change the losses.

    python benchmarks/teacher_options.py --config-file benchmarks/configs/gfl_r18_r50.yaml

Every option is a set of KD.TEACHER keys. A model is built for each of them, all with the same
weights, and all are timed in interleaved rounds: the teacher as the distillers use it, and a whole
KD step. Ratios are those to the teacher as Detectron2 would run it ("plain"), computed per round;
medians and quartiles are reported. "change" is the largest relative change of a distillation loss,
on the same batch and the same student; if one is above the option's tolerance, the exit status is
1. "no stage left out" also runs the stages that no distiller asks for, with the default keys: what
running on demand saves.

Give weights of trained networks (MODEL.WEIGHTS and KD.TEACHER.WEIGHTS) to judge the changes; time
does not depend on them. "compiled" takes a minute or two before the rounds.
"""

import argparse
import json
import os
from typing import Any, Callable, Dict, List, Tuple

from detectron2.utils.events import EventStorage
from step_time import (
    CLOCKS,
    _prepared,
    _step,
    environment,
    headline,
    interleaved,
    span,
    spread,
)

from kd_d2.checkpoint import atomic_write
from kd_d2.distillation import Key
from kd_d2.engine.main import build_config, short_errors
from kd_d2.visualization import markdown_table

REFERENCE = "plain"
EVERY_STAGE = "no stage left out"


def _keys(fuse: bool = True, channels_last: bool = True, dtype: str = "", compiler: str = ""):
    values = {"FUSE_BN": fuse, "CHANNELS_LAST": channels_last, "DTYPE": dtype, "COMPILE": compiler}
    return [text for key, value in values.items() for text in (f"KD.TEACHER.{key}", str(value))]


# name -> keys and values; from "default" on, each with the defaults beside it
OPTIONS: Dict[str, List[str]] = {
    REFERENCE: _keys(False, False),
    "FUSE_BN": _keys(True, False),
    "CHANNELS_LAST": _keys(False, True),
    "default: both": _keys(),
    "DTYPE bfloat16": _keys(dtype="bfloat16"),
    "DTYPE float16": _keys(dtype="float16"),
    "COMPILE inductor": _keys(compiler="inductor"),
    EVERY_STAGE: _keys(),
}
# What an option may change a loss by, relatively: rounding in another order, or in that precision.
EXACT = 1e-4
TOLERANCES = {"DTYPE bfloat16": 2e-2, "DTYPE float16": 2e-2}


def tolerance(option: str) -> float:
    """The largest relative change of a loss that an option may cause."""
    return TOLERANCES.get(option, EXACT)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="with KD.ENABLED True")
    parser.add_argument(
        "--options", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), metavar="NAME"
    )
    parser.add_argument("--image-size", type=int, nargs=2, default=(320, 320), metavar="PIXELS")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--output", default="", help="JSON file for the figures")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    with short_errors():
        cfg = build_config(args.config_file, args.opts)
        if not cfg.KD.ENABLED:
            raise ValueError(f"{args.config_file} has KD.ENABLED False: there is no teacher")
    names = [REFERENCE, *(name for name in args.options if name != REFERENCE)]
    figures = measure(args, names)
    env = environment(args, cfg)
    print(f"{os.path.relpath(args.config_file)}: {headline(env)}\n\n{table(figures)}")
    if args.output:
        with atomic_write(args.output) as f:
            f.write(json.dumps({"environment": env, "options": figures}, indent=1).encode())
    broken = [name for name in names if not figures[name]["change"] <= tolerance(name)]
    if broken:
        raise SystemExit(f"changes a loss by more than its tolerance: {', '.join(broken)}")


def measure(args: argparse.Namespace, names: List[str]) -> Dict[str, Dict[str, Any]]:
    """Figures of every option: seconds and ratios of teacher and step, change of the losses."""
    parts: Dict[Tuple[str, str], Callable] = {}
    losses = {}
    with EventStorage(0):
        for name in names:
            print(f"{name} ...", flush=True)
            teacher, step, losses[name] = _variant(args, name)
            parts["teacher", name], parts["step", name] = teacher, step
        times = interleaved(parts, args)
    return {
        name: {
            "change": largest_change(losses[name], losses[REFERENCE]),
            **{
                what: {
                    "seconds": spread(times[what, name]),
                    "ratio": spread(_ratios(times[what, name], times[what, REFERENCE])),
                }
                for what in ("teacher", "step")
            },
        }
        for name in names
    }


def _variant(args, name: str) -> Tuple[Callable, Callable, Dict[str, float]]:
    """Teacher's passes, whole step and distillation losses with the keys of an option."""
    own = argparse.Namespace(**{**vars(args), "opts": [*args.opts, *OPTIONS[name]]})
    _, model, optimizer, batch = _prepared(args.config_file, own, distil=True)
    needs = set(model._teacher_needs)
    if name == EVERY_STAGE:
        needs |= {key for key in model.teacher.keys if Key.parse(key).group in ("pred", "rpn")}
        model._teacher_needs = sorted(needs)
        start = model.teacher.start
        model.teacher.start = lambda *a, **k: _read(start(*a, **k), needs)
    losses = {k: v.item() for k, v in model(batch).items() if k.startswith("loss_kd/")}
    size = _padded(model, batch)

    def teacher():
        _read(model.teacher.start(batch, size, sorted(needs)), needs)

    return teacher, lambda: _step(model, optimizer, batch), losses


def _read(run, keys):
    """Everything in ``keys`` but what needs boxes."""
    for key in keys:
        if Key.parse(key).group != "roi":
            run[key]
    return run


def _padded(model, batch) -> Tuple[int, int]:
    step = max(model.student.backbone.size_divisibility, 1)
    height, width = batch[0]["image"].shape[-2:]
    return -(-height // step) * step, -(-width // step) * step


def _ratios(values: List[float], reference: List[float]) -> List[float]:
    return [value / other for value, other in zip(values, reference)]


def largest_change(losses: Dict[str, float], reference: Dict[str, float]) -> float:
    """Largest relative difference of a loss; of one that is 0 in ``reference``, the difference."""
    return max(abs(losses[k] - value) / (abs(value) or 1.0) for k, value in reference.items())


def table(figures: Dict[str, Dict[str, Any]]) -> str:
    header = ["option", "teacher, s", "teacher / plain", "KD step, s", "KD step / plain", "change"]
    header.append("tolerance")
    rows = []
    for name, values in figures.items():
        row = [name]
        for what in ("teacher", "step"):
            ratio = values[what]["ratio"]
            row += [f"{values[what]['seconds']['median']:.3f}"]
            row += [f"{ratio['median']:.3f} ({span(ratio, 3)})"]
        rows.append([*row, f"{values['change']:.1e}", f"{tolerance(name):.0e}"])
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
