#!/usr/bin/env python
r"""Gradients of CrossKD and of feature imitation at the features of the student's head (Fig. 4).

    python projects/CrossKD/tools/gradient_maps.py --config-file CONFIG --weights STUDENT.pth \
        --output gradients KD.TEACHER.WEIGHTS TEACHER.pth

For every image, |dL/df_i^s| averaged over channels, for each method, tower and level:
gradients_<index>.png (over the image), gradients_<index>.npz (raw values, keys
method.tower.level), shares.csv (fraction of the sum of |dL/df| inside ground-truth boxes, and
what it would be for a gradient spread evenly), table.md and index.html.
"""

import csv
import math
import os
from collections import defaultdict
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from command_line import add_drawing, chosen_levels
from tqdm import tqdm

from kd_d2.engine.analysis_command import parse, parser, prepare, teacher_of
from kd_d2.engine.main import short_errors
from kd_d2.projects.crosskd.analysis.gradient_maps import (
    box_coverage,
    gradient_maps,
    gradient_observer,
    min_max,
    share_inside,
    to_image,
)
from kd_d2.projects.crosskd.analysis.images import load_images, rgb_picture
from kd_d2.projects.crosskd.analysis.observer import student_of
from kd_d2.projects.crosskd.analysis.pictures import draw_overlays, level_name
from kd_d2.visualization import html_page, markdown_table


def parse_arguments(arguments: Optional[Sequence[str]] = None):
    result = parser(__doc__, num_images=4)
    result.add_argument("--weights", required=True, metavar="FILE", help="student's checkpoint")
    result.add_argument(
        "--position", type=int, default=-1, metavar="I", help="tower stage i (default: config's)"
    )
    result.add_argument(
        "--methods",
        default="CrossKD,PKD",
        metavar="A,B",
        help="distillers, as in KD.DISTILLERS (default: %(default)s); PKD is put at stage i",
    )
    result.add_argument(
        "--after-relu",
        action="store_true",
        help="gradient behind the ReLU of stage i, with what the ReLU keeps from the student",
    )
    result.add_argument(
        "--shared-scale",
        action="store_true",
        help="one colour range for all levels of a method and tower, instead of one per map",
    )
    add_drawing(result)
    return parse(result, arguments)


def analyse(record, observer, taps, labels, grid) -> Tuple[Dict[str, np.ndarray], List[dict]]:
    """Raw maps "method.tower.p<level>" of one image, and its rows of shares.csv."""
    seen = observer([record])
    boxes = record["instances"].gt_boxes.tensor
    maps, rows = {}, []
    for label in labels:
        for tower, key in taps.items():
            inside = even = total = 0.0
            for stride, values in zip(grid.strides, gradient_maps(seen, label, key)):
                values, name = values[0].double().cpu(), level_name(stride)
                coverage = box_coverage(boxes, tuple(values.shape), stride, grid.offset)
                share, flat = share_inside(values, coverage), float(coverage.mean())
                maps[f"{label}.{tower}.{name}"] = values.float().numpy()
                rows.append(_row(record, label, tower, name, share, flat))
                if not math.isnan(share):
                    total += float(values.sum())
                    inside += float(values.sum()) * share
                    even += float(values.sum()) * flat
            share, flat = (inside / total, even / total) if total else (math.nan, math.nan)
            rows.append(_row(record, label, tower, "all", share, flat))
    return maps, rows


def _row(record, label, tower, level, share, even) -> dict:
    return {
        "index": record["index"],
        "image_id": record["image_id"],
        "boxes": len(record["instances"]),
        "method": label,
        "tower": tower,
        "level": level,
        "share_inside": share,
        "share_if_even": even,
    }


def picture(path, record, maps, taps, labels, grid, levels, args, cfg) -> None:
    size = tuple(record["image"].shape[-2:])
    strides = [grid.strides[level] for level in levels]
    names = [level_name(stride) for stride in strides]
    rows = []
    for label in labels:
        for tower in taps:
            raw = [torch.from_numpy(maps[f"{label}.{tower}.{name}"]) for name in names]
            enlarged = [
                to_image(values, stride, size, grid.offset).numpy()
                for values, stride in zip(raw, strides)
            ]
            rows.append((f"{label}, {tower}", min_max(enlarged, args.shared_scale)))
    boxes = record["instances"].gt_boxes.tensor.tolist()
    draw_overlays(path, rgb_picture(record, cfg.INPUT.FORMAT), boxes, names, rows)


def table(rows: List[dict]) -> str:
    """Mean over the images with boxes, per method, tower and level."""
    groups = defaultdict(list)
    for row in rows:
        if row["boxes"] and not math.isnan(row["share_inside"]):
            groups[row["method"], row["tower"], row["level"]].append(row)
    lines = []
    for key, group in groups.items():
        share, even = (
            sum(row[name] for row in group) / len(group)
            for name in ("share_inside", "share_if_even")
        )
        lines.append([*key, f"{share:.3f}", f"{even:.3f}", f"{share / even:.2f}", str(len(group))])
    header = ["method", "tower", "level", "inside boxes", "if even", "ratio", "images"]
    return markdown_table(header, lines)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse_arguments(arguments)
    with short_errors():
        cfg, dataset = prepare(args)
        student, teacher = student_of(cfg, args.weights), teacher_of(cfg)
        observer, taps, labels = gradient_observer(
            cfg, student, teacher, args.methods.split(","), args.position, not args.after_relu
        )
        grid = student.anchor_generator
        levels = chosen_levels(args.levels, grid.strides)
        records = load_images(cfg, dataset, args.images, args.num_images)
    rows, pictures = [], []
    for record in tqdm(records, desc="gradient maps"):
        maps, lines = analyse(record, observer, taps, labels, grid)
        rows += lines
        name = os.path.join(args.output, f"gradients_{record['index']:05d}")
        boxes = record["instances"].gt_boxes.tensor.numpy()
        np.savez_compressed(f"{name}.npz", boxes=boxes, **maps)
        if len(pictures) < args.pictures:
            picture(f"{name}.png", record, maps, taps, labels, grid, levels, args, cfg)
            pictures.append(os.path.basename(f"{name}.png"))
    with open(os.path.join(args.output, "shares.csv"), "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = (
        f"Features: {', '.join(f'{tower} {key}' for tower, key in taps.items())}. Fraction of the "
        "sum of |dL/df| inside ground-truth boxes, mean over images, and the same for a gradient "
        "that is spread evenly over each level."
    )
    with open(os.path.join(args.output, "table.md"), "w") as f:
        f.write(f"{text}\n\n{table(rows)}\n")
    with open(os.path.join(args.output, "index.html"), "w") as f:
        f.write(html_page("CrossKD: gradient maps", text, table(rows), pictures))
    print(f"{text}\n\n{table(rows)}\n\nwritten to {args.output}")


if __name__ == "__main__":
    main()
