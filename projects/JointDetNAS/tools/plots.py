#!/usr/bin/env python
"""Draw the paper's figures of searches, from their journals and results alone.

    plots.py --search R50=output/search_r50 --search R101=output/search_r101 --output figures

writes actions.png (Fig. 6), capacity.png (Fig. 5), allocation.png (Fig. 7), scores.png (Fig. 8),
pareto.png (Fig. 9) and epochs.png: AP against epochs of training (Fig. 4 and 10), to which
--full TITLE=RUN:EPOCHS adds trainings in one piece, by metrics.json and config.yaml in their
folders. --weights TITLE=CHECKPOINT, several times, writes weights.png (Fig. 11).
"""

import argparse
import os
from typing import Dict, List, Sequence, Tuple

import torch

from kd_d2.checkpoint import load_checkpoint_file, load_yaml_config
from kd_d2.config import get_cfg
from kd_d2.engine.analysis_command import titled_path
from kd_d2.engine.main import import_components, short_errors
from kd_d2.projects.jointdetnas.search import figures
from kd_d2.projects.jointdetnas.search.analyses import epochs_curve
from kd_d2.projects.jointdetnas.search.candidate import Candidate
from kd_d2.projects.jointdetnas.search.journal import COMPLETE, Journal
from kd_d2.projects.jointdetnas.search.results import Result, best_result, points
from kd_d2.projects.jointdetnas.space import Architecture
from kd_d2.visualization.curves import read_metrics


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, what, text in (
        ("--search", "FOLDER", "OUTPUT_DIR of a search"),
        ("--full", "FOLDER:EPOCHS", "OUTPUT_DIR of a training, and the epochs that it lasted"),
        ("--weights", "FILE", "checkpoint of a student"),
    ):
        parser.add_argument(
            name,
            action="append",
            default=[],
            type=titled_path,
            metavar=f"TITLE={what}",
            help=f"{text}; may be given several times",
        )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    return parser


def read_search(folder: str) -> List[Result]:
    """Results of the complete trials, by number.

    Raises:
        ValueError: the folder is no search, or nothing is complete yet.
    """
    complete = [t.number for t in Journal(folder, create=False).trials() if t.state == COMPLETE]
    if not complete:
        raise ValueError(f"no trial of {folder} is complete yet")
    return [Candidate(folder, number).result() for number in complete]


def full_training(text: str) -> List[Tuple[float, float]]:
    """(epochs, AP) of a training, by FOLDER:EPOCHS.

    Raises:
        ValueError: no number of epochs.
    """
    folder, _, epochs = text.rpartition(":")
    try:
        total = float(epochs)
    except ValueError:
        raise ValueError(f"--full takes TITLE=FOLDER:EPOCHS, got '{text}'") from None
    cfg = get_cfg()
    load_yaml_config(cfg, os.path.join(folder, "config.yaml"))
    series = read_metrics(os.path.join(folder, "metrics.json")).get("bbox/AP", [])
    return [((i + 1) * total / cfg.SOLVER.MAX_ITER, ap) for i, ap in series]


def norm_weights(path: str) -> Dict[str, List[float]]:
    """|gamma| of the batch norms of a student's backbone, by group.

    Those inside of blocks together, without the last of each; those of each stage's projections.

    Raises:
        ValueError: the checkpoint has no entry ``arch``, so it is no student's.
    """
    data = load_checkpoint_file(path)
    if "arch" not in data:
        raise ValueError(f"{path} has no entry arch: it is no checkpoint of a student")
    architecture = Architecture.from_entry(data["arch"])
    groups: Dict[str, List[float]] = {"inside of blocks": []}
    for stage, index in architecture.positions:
        prefix = f"backbone.bottom_up.res{stage + 2}.{index}"
        block = architecture.block((stage, index))
        for conv in range(1, len(block.channels)):
            groups["inside of blocks"] += _absolute(data, f"{prefix}.conv{conv}.norm.weight")
        if block.projection:
            name = f"projection, stage {stage + 1}"
            groups[name] = groups.get(name, []) + _absolute(data, f"{prefix}.shortcut.norm.weight")
    return groups


def _absolute(data, key: str) -> List[float]:
    return torch.as_tensor(data["model"][key]).abs().tolist()


def allocation(found: Sequence[Result]) -> Tuple[Dict[str, int], Dict[str, int]]:
    """Multiply-adds by module of the base detector and of the best student."""
    first = min(found, key=lambda result: result["number"])
    return first["macs"], best_result(found)["macs"]


def draw(args: argparse.Namespace) -> List[str]:
    """Write the figures; return their paths.

    Raises:
        ValueError: there is nothing to draw, or what is given is no search, run or student.
    """
    if not (args.search or args.full or args.weights):
        raise ValueError("give what to draw: --search, --full or --weights")
    import_components()
    searches = {title: read_search(folder) for title, folder in args.search}
    os.makedirs(args.output, exist_ok=True)
    drawings = {}
    if searches:
        pareto = {title: points(found) for title, found in searches.items()}
        before_after = {title: allocation(found) for title, found in searches.items()}
        drawings["actions"] = (figures.draw_actions, searches)
        drawings["capacity"] = (figures.draw_capacity, searches)
        drawings["allocation"] = (figures.draw_allocation, before_after)
        drawings["scores"] = (figures.draw_scores, searches)
        drawings["pareto"] = (figures.draw_pareto, pareto)
    curves = {title: epochs_curve(found) for title, found in searches.items()}
    curves.update({title: full_training(text) for title, text in args.full})
    if curves:
        drawings["epochs"] = (figures.draw_epochs, curves)
    if args.weights:
        networks = {title: norm_weights(path) for title, path in args.weights}
        drawings["weights"] = (figures.draw_weights, networks)
    paths = []
    for name, (function, content) in drawings.items():
        paths.append(os.path.join(args.output, f"{name}.png"))
        function(content, paths[-1])
    return paths


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    with short_errors():
        print("\n".join(f"wrote {path}" for path in draw(args)))


if __name__ == "__main__":
    main()
