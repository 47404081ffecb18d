#!/usr/bin/env python
r"""Measure how strongly the mimic loss pulls, and whether it pulls where the S-head's losses do.

    python projects/MimicDet/tools/mimic_pull.py --config-file CONFIG --batches 20 \
        MODEL.WEIGHTS output/.../model_final.pth

Without training: on batches of the config's training data, for each term of the mimic loss, on
objects, background and all boxes together, the mean of 1 - cos, and at the pyramid, at the S-head's
alignment and at its 1x1 layers the norm of the term's gradient divided by that of the S-head's
detection losses, and the cosine between the two. Means over the batches. MODEL.WEIGHTS are those of
a MimicDet, or initial ones, with which the heads are random.
"""

import argparse
import itertools
import math
import statistics
from typing import Dict, List, Optional, Sequence, Tuple

from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from tqdm import tqdm

from kd_d2.checkpoint import KDCheckpointer
from kd_d2.engine.main import check, short_errors
from kd_d2.engine.trainer import KDTrainer
from kd_d2.projects.mimicdet.mimicdet import MimicDet
from kd_d2.projects.mimicdet.pull import PLACES, MimicPull, mimic_pull
from kd_d2.visualization import markdown_table


def parse_arguments(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--batches", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of config keys"
    )
    parser.set_defaults(eval_only=False)
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> List[List[MimicPull]]:
    """What was measured of each batch.

    Raises:
        ValueError, FileNotFoundError: config, data, weights or arguments are wrong.
    """
    if args.batches < 1:
        raise ValueError(f"--batches must be at least 1, got {args.batches}")
    cfg = KDTrainer.auto_scale_workers(check(args), 1)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    model = build_model(cfg)
    if not isinstance(model, MimicDet):
        raise ValueError(f"MODEL.META_ARCHITECTURE must be MimicDet, got {type(model).__name__}")
    KDCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    batches = itertools.islice(KDTrainer.build_train_loader(cfg), args.batches)
    model.train()
    return [mimic_pull(model, batch) for batch in tqdm(batches, total=args.batches)]


def table(measured: List[List[MimicPull]]) -> str:
    """Markdown; rows are terms and boxes."""
    by_row: Dict[Tuple[str, str], List[MimicPull]] = {}
    for pull in itertools.chain.from_iterable(measured):
        by_row.setdefault((pull.term, pull.boxes), []).append(pull)
    header = ["term", "boxes", "number", "1 - cos"]
    header += [text for place in PLACES for text in (f"{place}: ratio", "cosine")]
    rows = []
    for (term, boxes), pulls in by_row.items():
        row = [term, boxes, f"{statistics.fmean(x.count for x in pulls):.1f}"]
        row.append(_mean([x.distance for x in pulls]))
        for place in PLACES:
            row.append(_mean([x.ratios[place] for x in pulls]))
            row.append(_mean([x.agreement[place] for x in pulls], "+"))
        rows.append(row)
    return markdown_table(header, rows)


def _mean(values: List[float], sign: str = "") -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{statistics.fmean(finite):{sign}.3f}" if finite else ""


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse_arguments(arguments)
    with short_errors():
        measured = measure(args)
    print(table(measured))


if __name__ == "__main__":
    main()
