#!/usr/bin/env python
"""Measure how strongly distillation pulls at the student, and suggest weights.

    python tools/calibrate_kd.py --config-file configs/x.yaml --warmup 200 --iterations 50 \\
        --target-ratio 1.0 MODEL.DEVICE cpu

Runs training iterations on the config's data without changing a weight (or with --train), and
prints for every term the norm of its gradient at the pyramid and at the student's parameters,
divided by that of the detection losses of the same iteration, and the cosine of both gradients,
which is below 0 where the term pulls against the detector. The suggested weights bring the mean
ratio at the pyramid to the target; with --by-term that of every term to the target which its
distiller declares. Runs in one process, in fp32, without the schedules of the distillers; nothing
is written.

Ratios are far too large while the student's head is at its random initialisation, and change all
through training. Train on before measuring (--warmup), give the weights of a trained student
(MODEL.WEIGHTS), and log KD.GRAD_RATIO_PERIOD during training. Distillers with adapters or queues
pull at random while these are new: train them first (--train-distillers).
"""

import argparse
import dataclasses
import json
import math
import sys
from typing import Any, Dict, List, Optional, Sequence

import torch
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate
from tqdm import tqdm

from kd_d2.engine.calibration import (
    Pull,
    Spread,
    build_run,
    measure,
    train,
    train_distillers,
    training_update,
    warnings_of,
)
from kd_d2.engine.main import check, short_errors
from kd_d2.engine.weight_suggestions import Suggestion, power_of_two, suggest

_HEADER = [
    *("loss", "weight", "raw value", "at the pyramid", "min .. max", "cosine"),
    *("at the parameters", "cosine"),
]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="YAML", help="with KD.ENABLED True")
    parser.add_argument("--iterations", type=int, default=50, help="default: %(default)s")
    parser.add_argument(
        "--warmup",
        type=int,
        default=0,
        metavar="N",
        help="train for N iterations before, as the config says (default: %(default)s)",
    )
    parser.add_argument(
        "--target-ratio",
        type=float,
        default=1.0,
        help="wanted gradient norm of each distiller relative to the detection losses' "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--plain-warmup",
        action="store_true",
        help="in the iterations of --warmup the student learns from the detection losses only",
    )
    parser.add_argument(
        "--train-distillers",
        type=int,
        default=0,
        metavar="N",
        help="then train only the distillers' own parameters for N iterations, which also fills "
        "their queues (default: %(default)s)",
    )
    parser.add_argument(
        "--by-term",
        action="store_true",
        help="every term reaches the ratio that its distiller declares; --target-ratio is for "
        "distillers that declare none",
    )
    parser.add_argument(
        "--power-of-two", action="store_true", help="round what is suggested to powers of two"
    )
    parser.add_argument(
        "--train", action="store_true", help="train on while measuring, as the config says"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    form.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of config keys"
    )
    parser.set_defaults(eval_only=False)
    return parser


def calibrate(args: argparse.Namespace) -> Dict[str, Any]:
    """Measure as the command line says.

    Returns:
        "pulls", "suggestions", "warnings" and what was measured how.

    Raises:
        ValueError, FileNotFoundError: config, data, weights or arguments are wrong.
    """
    if not args.target_ratio > 0 or args.iterations < 1 or args.warmup < 0:
        raise ValueError(
            "--target-ratio must be positive, --iterations at least 1 and --warmup not negative, "
            f"got {args.target_ratio}, {args.iterations} and {args.warmup}"
        )
    if args.train_distillers < 0:
        raise ValueError(f"--train-distillers must not be negative, got {args.train_distillers}")
    cfg = check(args)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    cfg, model, batches, random_head = build_run(cfg)
    update = training_update(cfg, model) if args.train or args.warmup else None
    if args.warmup:
        learner = model.student if args.plain_warmup else model
        train(learner, batches, args.warmup, update, progress=_bar("warming up", args.warmup))
    if args.train_distillers:
        bar = _bar("training distillers", args.train_distillers)
        train_distillers(cfg, model, batches, args.train_distillers, progress=bar)
    pulls = measure(
        model,
        batches,
        args.iterations,
        update=update if args.train else None,
        progress=_bar("calibrating", args.iterations),
    )
    notes = warnings_of(pulls)
    if random_head and not args.warmup:
        notes.append(
            "the student's head is at its random initialisation, where the detector's own gradient "
            "is small: ratios are too large and suggested weights too small; use --warmup, or "
            "MODEL.WEIGHTS of a trained student"
        )
    return {
        "config": args.config_file,
        "overrides": list(args.opts),
        "iterations": args.iterations,
        "images per iteration": cfg.SOLVER.IMS_PER_BATCH,
        "warmup": args.warmup,
        "plain warmup": args.plain_warmup,
        "distillers trained": args.train_distillers,
        "trained": args.train,
        "device": str(torch.device(cfg.MODEL.DEVICE)),
        "torch": torch.__version__,
        "target ratio": args.target_ratio,
        "pulls": pulls,
        "suggestions": suggest(
            cfg,
            model,
            pulls,
            args.target_ratio,
            by_term=args.by_term,
            rounded=power_of_two if args.power_of_two else float,
        ),
        "warnings": notes,
    }


def _bar(title: str, total: int):
    return lambda steps: tqdm(steps, total=total, desc=title, unit="iteration")


def as_json(result: Dict[str, Any]) -> str:
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        # JSON has no NaN
        return None if isinstance(value, float) and not math.isfinite(value) else value

    lists = {k: [dataclasses.asdict(x) for x in result[k]] for k in ("pulls", "suggestions")}
    return json.dumps(plain({**result, **lists}), indent=2)


def as_text(result: Dict[str, Any], markdown: bool = False) -> str:
    """What a person reads."""
    pulls: List[Pull] = result["pulls"]
    detection = pulls[-1]
    rows = [_row(pull) for pull in pulls[:-1]]
    how = "trained on" if result["trained"] else "without changing a weight"
    if result["warmup"]:
        kind = "plain training" if result["plain warmup"] else "training"
        how += f", after {result['warmup']} of {kind}"
    if result["distillers trained"]:
        how += f", distillers trained for {result['distillers trained']} by themselves"
    lines = [
        f"{result['iterations']} iterations of {result['images per iteration']} images, {how}. "
        "Ratios are gradient norms divided by those of the detection losses, mean ± standard "
        "deviation over the iterations; cosines are those of both gradients, below 0 where a loss "
        "pulls against the detection losses.",
        "Detection losses: "
        f"{_pm(detection.norms['pyramid'])} at the pyramid, "
        f"{_pm(detection.norms['parameters'])} at the parameters.",
        "",
        tabulate(rows, _HEADER, tablefmt="github" if markdown else "simple", disable_numparse=True),
        "",
    ]
    lines += [f"warning: {text}" for text in result["warnings"]]
    lines += [""] if result["warnings"] else []
    by_term = any(item.targets for item in result["suggestions"])
    lines.append(
        f"For a ratio of {result['target ratio']:g}" + (" or as wanted:" if by_term else ":")
    )
    bullet = "* " if markdown else "  "
    overrides = []
    for item in result["suggestions"]:
        lines += [bullet + text for text in _suggestion(item)]
        overrides += [f"{c.key} {_weight(c.suggested)}" for c in item.changes]
    if overrides:
        lines += ["", ("`{}`" if markdown else "{}").format(" ".join(overrides))]
    return "\n".join(lines)


def _row(pull: Pull) -> List[str]:
    ratio = pull.ratios["pyramid"]
    return [
        pull.name,
        "" if pull.weight is None else _short(pull.weight),
        "" if pull.raw is None else _pm(pull.raw),
        _pm(ratio),
        f"{_short(ratio.min)} .. {_short(ratio.max)}",
        _pm(pull.cosines["pyramid"]),
        _pm(pull.ratios["parameters"]),
        _pm(pull.cosines["parameters"]),
    ]


def _suggestion(item: Suggestion) -> List[str]:
    if not math.isfinite(item.factor):
        return [f"{item.label}: nothing can be said, no gradient was measured"]
    where = "" if item.group == "pyramid" else " (at the parameters: no pyramid is trained)"
    wanted = ", ".join(f"{term} {_short(ratio)}" for term, ratio in item.targets.items())
    wanted = f"wanted {wanted}: " if wanted else ""
    head = f"{item.label}: {_short(item.measured)} now{where}, {wanted}"
    if item.changes:
        changes = ", ".join(
            f"{c.key} {_short(c.now)} -> {_weight(c.suggested)}" for c in item.changes
        )
        lines = [head + changes]
    else:
        lines = [head + f"multiply its weights by {_short(item.factor)}"]
    if len(item.alone) > 1 and not item.targets:
        alone = ", ".join(f"{term} {_short(weight)}" for term, weight in item.alone.items())
        lines.append(f"{item.label}, each term by itself at the target: weights {alone}")
    return lines


def _short(value: float) -> str:
    return f"{value:.3g}"


def _weight(value: float) -> str:
    """Powers of two exactly."""
    return f"{value:.12g}" if math.frexp(value)[0] == 0.5 else _short(value)


def _pm(spread: Spread) -> str:
    return f"{_short(spread.mean)} ± {_short(spread.std)}"


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = build_parser().parse_args(argv)
    with short_errors():
        result = calibrate(args)
    print(as_json(result) if args.json else as_text(result, args.markdown))


if __name__ == "__main__":
    main(sys.argv[1:])
