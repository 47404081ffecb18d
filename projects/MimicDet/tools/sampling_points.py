#!/usr/bin/env python
r"""Draw where the S-head reads the map for its best adjusted boxes (Fig. 3 of the paper).

    python projects/MimicDet/tools/sampling_points.py --config-file CONFIG \
        --model mimic=MODEL.pth --model "no mimic=OTHER.pth" --output points

Every model is a row: yellow the adjusted box, red the sampling points of its cell. All models must
have the architecture of the config, but for the T-head. Writes points_<index>.png, points.csv and
prints the share of the points that lie inside of their box: 100 % for points spread over the box,
less if they do not follow it.
"""

import argparse
import csv
import os
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tqdm import tqdm

from kd_d2.checkpoint import KDCheckpointer
from kd_d2.data import annotated_images
from kd_d2.engine.analysis_command import add_titled, parse, parser, prepare
from kd_d2.engine.main import short_errors
from kd_d2.projects.mimicdet.mimicdet import MimicDet
from kd_d2.projects.mimicdet.sampling_points import SamplingPoints, sampling_points, share_inside

_CORNERS = ("x0", "y0", "x1", "y1")


def parse_arguments(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    result = parser(__doc__, num_images=4)
    add_titled(result, "--model", "FILE", "checkpoint of a MimicDet")
    result.add_argument(
        "--boxes", type=int, default=4, metavar="N", help="per image (default: %(default)s)"
    )
    return parse(result, arguments)


def load(cfg: CfgNode, path: str) -> MimicDet:
    """The detector with the weights of ``path``; a T-head may be missing there or be too many.

    Raises:
        ValueError: the config is that of another detector or has no S-head, or the file does not
            have the weights.
    """
    model = build_model(cfg)
    if not isinstance(model, MimicDet) or model.s_head is None:
        raise ValueError(
            "MODEL.META_ARCHITECTURE must be MimicDet with MODEL.MIMICDET.S_HEAD.ENABLED, got "
            f"{cfg.MODEL.META_ARCHITECTURE}"
        )
    checkpointer = KDCheckpointer(model)
    checkpointer.load(path)
    training_only = ("t_head", "backbone.fpn_lateral2", "backbone.fpn_output2")
    report = checkpointer.last_report.without(training_only)
    if not report.ok:
        raise ValueError(f"{path} does not fit the model of the config.\n{report.format()}")
    return model.eval()


def picture(path: str, image: np.ndarray, rows: List[Tuple[str, SamplingPoints]]) -> None:
    """Draw one row a model and one column a box."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    columns = max(max(len(found.boxes) for _, found in rows), 1)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(2.8 * columns, 3.0 * len(rows)), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    height, width = image.shape[:2]
    for line, (title, found) in zip(axes, rows):
        for i, (axis, box, points) in enumerate(zip(line, found.boxes, found.points)):
            x0, y0, x1, y1 = box.tolist()
            axis.imshow(image, extent=(0, width, height, 0))
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="yellow"))
            axis.scatter(*points.T.tolist(), s=6, color="red")
            inside = share_inside(points, box)
            axis.set_title(f"{title if i == 0 else ''} {100 * inside:.0f} %", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rows_of(title: str, index: int, found: SamplingPoints) -> List[Dict[str, Any]]:
    return [
        {
            "model": title,
            "index": index,
            "level": f"p{int(level) + 3}",
            "score": round(float(score), 4),
            **{name: round(value, 2) for name, value in zip(_CORNERS, box.tolist())},
            "inside": round(share_inside(points, box), 4),
        }
        for box, score, level, points in zip(*found)
    ]


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse_arguments(arguments)
    with short_errors():
        if args.boxes < 1:
            raise ValueError(f"--boxes must be at least 1, got {args.boxes}")
        cfg, dataset = prepare(args)
        models = [(title, load(cfg, path)) for title, path in args.model]
        records = annotated_images(cfg, dataset, args.images, args.num_images)
    table: List[Dict[str, Any]] = []
    for record in tqdm(records, desc="sampling points"):
        index = record["index"]
        found = [(title, sampling_points(model, record, args.boxes)) for title, model in models]
        image = record["image"].permute(1, 2, 0).numpy()
        image = image if cfg.INPUT.FORMAT == "RGB" else image[:, :, ::-1]
        picture(os.path.join(args.output, f"points_{index:05d}.png"), image, found)
        for title, points in found:
            table += rows_of(title, index, points)
    with open(os.path.join(args.output, "points.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]) if table else ["model"])
        writer.writeheader()
        writer.writerows(table)
    for title, _ in models:
        shares = [row["inside"] for row in table if row["model"] == title]
        mean = f"{100 * np.mean(shares):.1f} %" if shares else "no boxes"
        print(f"{title}: {mean} of the points lie inside of their box ({len(shares)} boxes)")


if __name__ == "__main__":
    main()
