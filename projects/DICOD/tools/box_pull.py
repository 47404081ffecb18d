#!/usr/bin/env python
r"""Measure where the localisation terms pull boxes that lie beside their objects, without training.

    python projects/DICOD/tools/box_pull.py --config-file CONFIG --batches 20

Annotated boxes of the config's training data are moved by parts of their sides in random
directions. For each distance: the mean IoU with the annotated box, and for each localisation term
of the config and for SSD's box loss, each with its weight, the mean norm of the gradient of a box
(sides of the box count 1) and the mean cosine between the negative gradient and the way back.
"""

import argparse
import itertools
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.structures import ImageList
from detectron2.utils.env import seed_all_rng
from torch import Tensor
from tqdm import tqdm

from kd_d2.engine.calibration import build_run
from kd_d2.engine.main import check, short_errors
from kd_d2.modeling.layers.paired_iou import paired_iou
from kd_d2.projects.dicod.box_pull import BOX_LOSS, BoxPull, displaced, pull_of_boxes
from kd_d2.projects.dicod.distiller import DICOD
from kd_d2.projects.dicod.kd_loc import OBJ
from kd_d2.visualization import markdown_table

# lengths of the change of the four coordinates, in sides of the box
DISTANCES = (0.02, 0.05, 0.1, 0.2, 0.3)

# distance -> IoUs and pulls of every batch
Measured = Dict[float, List[Tuple[Tensor, Dict[str, BoxPull]]]]


def parse_arguments(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="YAML", help="with KD.DICOD.LOC.ENABLED True"
    )
    parser.add_argument("--batches", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of config keys"
    )
    parser.set_defaults(eval_only=False)
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> Tuple[DICOD, Measured]:
    """Return the distiller, and what was measured.

    Raises:
        ValueError, FileNotFoundError: config, data, weights or arguments are wrong.
    """
    if args.batches < 1:
        raise ValueError(f"--batches must be at least 1, got {args.batches}")
    cfg = check(args)
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    cfg, model, batches, _ = build_run(cfg)
    distillers = [x for x in model.distillers.values() if isinstance(x, DICOD) and x.pools]
    if not distillers:
        raise ValueError(
            "the config has no localisation term: KD.DISTILLERS must name DICOD, with "
            "KD.DICOD.LOC.ENABLED True and a weight above 0"
        )
    distiller = distillers[0]
    options = {"pools": distiller.pools, **distiller.crop_options}
    if any(view != OBJ for view in distiller.pools):
        options["features"] = model.teacher.features
    mean, std = (
        torch.tensor(x).view(-1, 1, 1) for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    measured: Measured = {distance: [] for distance in DISTANCES}
    for batch in tqdm(itertools.islice(batches, args.batches), total=args.batches):
        images = ImageList.from_tensors(
            [((x["image"].float() - mean) / std).to(model.device) for x in batch]
        )
        truth = [x["instances"].gt_boxes.tensor.to(model.device) for x in batch]
        for distance, results in measured.items():
            boxes = [displaced(gt, distance) for gt in truth]
            pulls = pull_of_boxes(images.tensor, images.image_sizes, truth, boxes, **options)
            results.append((paired_iou(torch.cat(boxes), torch.cat(truth)), pulls))
    return distiller, measured


def table(distiller: DICOD, measured: Measured) -> str:
    """Markdown; rows are distances."""
    weights = {
        view: distiller.weights["loc_feat"] / len(distiller.layers) for view in distiller.layers
    }
    weights |= {OBJ: distiller.weights.get("loc_obj"), BOX_LOSS: 1.0}
    terms = [*distiller.pools, BOX_LOSS]
    header = ["distance", "IoU"]
    for term in terms:
        header += [f"{term} x {weights[term]:g}: gradient", "cosine"]
    rows = []
    for distance, results in measured.items():
        row = [f"{distance:g}", f"{torch.cat([ious for ious, _ in results]).mean():.2f}"]
        for term in terms:
            parts = [pulls[term] for _, pulls in results]
            gradient = weights[term] * torch.cat([x.gradient for x in parts]).mean()
            row += [f"{gradient:.2f}", f"{torch.cat([x.cosine for x in parts]).mean():.2f}"]
        rows.append(row)
    number = sum(len(ious) for ious, _ in next(iter(measured.values())))
    return f"{markdown_table(header, rows)}\n\n{number} boxes"


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse_arguments(arguments)
    with short_errors():
        measured = measure(args)
    print(table(*measured))


if __name__ == "__main__":
    main()
