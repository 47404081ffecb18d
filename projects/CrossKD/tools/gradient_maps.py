#!/usr/bin/env python
"""Gradients of CrossKD and of feature imitation at the features of the student's head (Fig. 4).

    python projects/CrossKD/tools/gradient_maps.py --config-file CONFIG --weights STUDENT.pth \
        --output gradients KD.TEACHER.WEIGHTS TEACHER.pth

For every image, |dL/df_i^s| averaged over channels, for each method, tower and level:
gradients_<index>.png (over the image), gradients_<index>.npz (raw values, keys
method.tower.level), shares.csv (fraction of the sum of |dL/df| inside ground-truth boxes, and the
fraction of the image that the boxes cover), table.md and index.html.
"""

import csv
import math
import os
from collections import defaultdict
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from command_line import parse, parser, prepare, teacher_of
from tqdm import tqdm

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
    return parse(result, arguments)


def analyse(record, observer, taps, labels, strides) -> Tuple[Dict[str, np.ndarray], List[dict]]:
    """Raw maps "method.tower.p<level>" of one image, and its rows of shares.csv."""
    seen = observer([record])
    boxes = record["instances"].gt_boxes.tensor
    size = tuple(record["image"].shape[-2:])
    area = float(box_coverage(boxes, size, 1).mean())
    maps, rows = {}, []
    for label in labels:
        for tower, key in taps.items():
            inside = total = 0.0
            for stride, values in zip(strides, gradient_maps(seen, label, key)):
                values = values[0].double().cpu()
                name = level_name(stride)
                maps[f"{label}.{tower}.{name}"] = values.float().numpy()
                share = share_inside(values, box_coverage(boxes, tuple(values.shape), stride))
                rows.append(_row(record, label, tower, name, share, area, len(boxes)))
                total += float(values.sum())
                inside += float(values.sum()) * (0.0 if math.isnan(share) else share)
            share = inside / total if total else math.nan
            rows.append(_row(record, label, tower, "all", share, area, len(boxes)))
    return maps, rows


def _row(record, label, tower, level, share, area, num_boxes) -> dict:
    return {
        "index": record["index"],
        "image_id": record["image_id"],
        "method": label,
        "tower": tower,
        "level": level,
        "share_inside": share,
        "box_area": area,
        "boxes": num_boxes,
    }


def picture(path, record, maps, taps, labels, strides, cfg, shared: bool) -> None:
    size = tuple(record["image"].shape[-2:])
    names = [level_name(stride) for stride in strides]
    rows = []
    for label in labels:
        for tower in taps:
            raw = [maps[f"{label}.{tower}.{name}"] for name in names]
            enlarged = [
                to_image(torch.from_numpy(values), stride, size).numpy()
                for values, stride in zip(raw, strides)
            ]
            rows.append((f"{label}, {tower}", min_max(enlarged, shared)))
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
        share, area = (
            sum(row[name] for row in group) / len(group) for name in ("share_inside", "box_area")
        )
        lines.append([*key, f"{share:.3f}", f"{area:.3f}", f"{share / area:.2f}", str(len(group))])
    header = ["method", "tower", "level", "inside boxes", "area of boxes", "ratio", "images"]
    return markdown_table(header, lines)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse_arguments(arguments)
    with short_errors():
        cfg, dataset = prepare(args)
        student, teacher = student_of(cfg, args.weights), teacher_of(cfg)
        observer, taps, labels = gradient_observer(
            cfg, student, teacher, args.methods.split(","), args.position, not args.after_relu
        )
        records = load_images(cfg, dataset, args.images, args.num_images)
    strides = list(student.anchor_generator.strides)
    rows, pictures = [], []
    for record in tqdm(records, desc="gradient maps"):
        maps, lines = analyse(record, observer, taps, labels, strides)
        rows += lines
        name = os.path.join(args.output, f"gradients_{record['index']:05d}")
        boxes = record["instances"].gt_boxes.tensor.numpy()
        np.savez_compressed(f"{name}.npz", boxes=boxes, **maps)
        picture(f"{name}.png", record, maps, taps, labels, strides, cfg, args.shared_scale)
        pictures.append(os.path.basename(f"{name}.png"))
    with open(os.path.join(args.output, "shares.csv"), "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = (
        f"Features: {', '.join(f'{tower} {key}' for tower, key in taps.items())}. Fraction of the "
        "sum of |dL/df| inside ground-truth boxes, mean over images; the ratio to the area of the "
        "boxes is 1 for a gradient that is spread evenly."
    )
    with open(os.path.join(args.output, "table.md"), "w") as f:
        f.write(f"{text}\n\n{table(rows)}\n")
    with open(os.path.join(args.output, "index.html"), "w") as f:
        f.write(html_page("CrossKD: gradient maps", text, table(rows), pictures))
    print(f"{text}\n\n{table(rows)}\n\nwritten to {args.output}")


if __name__ == "__main__":
    main()
