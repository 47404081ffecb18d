#!/usr/bin/env python
"""Parameters, multiply-adds and the paper's FLOPs of students, by module; --latency: their speed.

An architecture is a preset (r18, searched_r101, ...), an encoding, or a checkpoint that has one.
"""

import argparse
import os
from pathlib import Path
from typing import Dict

import torch
from detectron2.modeling import build_model

from kd_d2.analysis import flop_analysis
from kd_d2.checkpoint import load_checkpoint_file
from kd_d2.engine.main import build_config, short_errors
from kd_d2.projects.jointdetnas.cost import Cost, Size, detector_cost, latency, total
from kd_d2.projects.jointdetnas.presets import config_text, resolve
from kd_d2.projects.jointdetnas.space import Architecture

BASE = Path(__file__).resolve().parents[1] / "configs/bases/Base-FasterRCNN.yaml"
BACKBONE = ("stem", "res2", "res3", "res4", "res5")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("architectures", nargs="+", metavar="ARCHITECTURE")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(1333, 800),
        metavar=("WIDTH", "HEIGHT"),
        help="of the image in pixels (default: 1333 800)",
    )
    parser.add_argument(
        "--latency",
        action="store_true",
        help="build the detector, count it with fvcore on the padded image, and time it",
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed detections (default: 20)")
    parser.add_argument(
        "--device", default="", help="device of --latency (default: a GPU if there is one)"
    )
    return parser


def read_architecture(text: str) -> Architecture:
    """The architecture of a checkpoint, a preset or an encoding."""
    if not os.path.isfile(text):
        return resolve(text)
    data = load_checkpoint_file(text)
    if not isinstance(data, dict) or "arch" not in data:
        raise ValueError(f"{text} has no entry arch")
    return Architecture.from_entry(data["arch"])


def table(name: str, costs: Dict[str, Cost]) -> str:
    """Rows by module, of the backbone and of the detector."""
    rows = dict(costs)
    rows["backbone"] = total({key: costs[key] for key in BACKBONE})
    rows["detector"] = total(costs)
    lines = [name, f"  {'module':<10}{'parameters':>14}{'GMAC':>10}{'GFLOPs':>10}"]
    lines += [
        f"  {key:<10}{cost.parameters:>14,}{cost.macs / 1e9:>10.2f}{cost.flops / 1e9:>10.2f}"
        for key, cost in rows.items()
    ]
    return "\n".join(lines)


def measured(architecture: Architecture, size: Size, rounds: int, device: str) -> str:
    """One line about the real detector, with random weights, on the padded image."""
    opts = ["MODEL.DEVICE", device] if device else []
    opts += ["MODEL.MORPH_RESNET.ENCODING", config_text(architecture)]
    opts += ["MODEL.RESNETS.STEM_OUT_CHANNELS", str(architecture.stem), "MODEL.WEIGHTS", ""]
    model = build_model(build_config(str(BASE), opts)).eval()
    image = torch.zeros(3, size[1], size[0])
    operators = flop_analysis(model, ([{"image": image}],)).by_operator()
    macs = operators["conv"] + operators["linear"]
    seconds = latency(model, size, rounds=rounds)
    return (
        f"  as run by Detectron2 on {model.device}: {macs / 1e9:.2f} GMAC on the padded image, "
        f"{1 / seconds:.1f} images/s, one at a time ({1000 * seconds:.1f} ms, median)"
    )


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    size = tuple(args.size)
    with short_errors():
        if min(size) < 1:
            raise ValueError(f"--size must be positive, got {size}")
        architectures = [read_architecture(text) for text in args.architectures]
    print(f"image of {size[0]}x{size[1]}, not padded; 1000 regions, 80 classes")
    for text, architecture in zip(args.architectures, architectures):
        print(table(text, detector_cost(architecture, size)))
        if args.latency:
            print(measured(architecture, size, args.rounds, args.device))


if __name__ == "__main__":
    main()
