#!/usr/bin/env python
r"""Where the ground truth and the teacher ask the student for different class scores (Fig. 2).

    python projects/CrossKD/tools/conflict_maps.py --config-file CONFIG --weights STUDENT.pth \
        --output conflicts KD.TEACHER.WEIGHTS TEACHER.pth

For every image and level: the ground-truth target, sigma of the teacher's logits, their absolute
difference and the positions where it exceeds the threshold in some class. Writes
conflicts_<index>.png (highest value over anchors and classes), conflicts_<index>.npz (everything),
fractions.csv, table.md and index.html. The student's weights matter only for detectors whose
target depends on their own boxes (GFL).
"""

import csv
import os
from collections import Counter
from typing import Dict, List, Optional, Sequence

import numpy as np
from command_line import add_drawing, chosen_levels
from tqdm import tqdm

from kd_d2.data import dataset_classes
from kd_d2.distillation import freeze
from kd_d2.engine.analysis_command import parse, parser, prepare, teacher_of
from kd_d2.engine.main import short_errors
from kd_d2.projects.crosskd.analysis.conflict_maps import conflict_maps, count_conflicts
from kd_d2.projects.crosskd.analysis.dense import DenseBatch
from kd_d2.projects.crosskd.analysis.gradient_maps import to_image
from kd_d2.projects.crosskd.analysis.images import load_images, rgb_picture
from kd_d2.projects.crosskd.analysis.observer import PREDICTIONS, Observer, student_of
from kd_d2.projects.crosskd.analysis.pictures import draw_overlays, level_name
from kd_d2.visualization import html_page, markdown_table

COUNTS = ("positions", "conflicts", "positives", "positive_conflicts")
TITLES = ("ground-truth target", "teacher", "difference", "conflict")


def parse_arguments(arguments: Optional[Sequence[str]] = None):
    result = parser(__doc__, num_images=4)
    result.add_argument("--weights", required=True, metavar="FILE", help="student's checkpoint")
    result.add_argument(
        "--threshold",
        type=float,
        default=0.3,
        metavar="D",
        help="a larger difference is a conflict (default: %(default)s; the paper gives none)",
    )
    result.add_argument(
        "--target",
        choices=("detector", "one"),
        default="detector",
        help="score wanted at a positive: as the detector's loss (GFL: IoU of its box), or 1",
    )
    result.add_argument(
        "--class",
        dest="label",
        default="",
        metavar="NAME",
        help="draw this class only (default: the highest of all)",
    )
    add_drawing(result)
    return parse(result, arguments)


def class_index(label: str, names: Sequence[str]) -> slice:
    """The classes to draw.

    Raises:
        ValueError: the data set has no such class.
    """
    if not label:
        return slice(None)
    if label not in names:
        raise ValueError(f"--class '{label}' is none of the data set's: {', '.join(names)}")
    index = list(names).index(label)
    return slice(index, index + 1)


def arrays(levels) -> Dict[str, np.ndarray]:
    """Raw arrays of one image by "<what>.p<level>"; see LevelConflict."""
    result = {}
    for level in levels:
        for name in ("ground_truth", "teacher", "counted", "positive", "conflict"):
            result[f"{name}.{level_name(level.stride)}"] = getattr(level, name).cpu().numpy()
    return result


def picture(path: str, record, levels, classes: slice, offset: float, cfg) -> None:
    size = tuple(record["image"].shape[-2:])
    rows = []
    for level in levels:
        maps = [x[:, classes].amax(dim=(0, 1)) for x in _scores(level)]
        maps.append(level.conflict.any(dim=0).float())
        enlarged = [to_image(x.cpu(), level.stride, size, offset, "nearest").numpy() for x in maps]
        rows.append((level_name(level.stride), enlarged))
    boxes = record["instances"].gt_boxes.tensor.tolist()
    draw_overlays(path, rgb_picture(record, cfg.INPUT.FORMAT), boxes, TITLES, rows)


def _scores(level):
    return level.ground_truth, level.teacher, level.difference


def row_of(record, name: str, counts: Dict[str, int]) -> dict:
    return {"index": record["index"], "image_id": record["image_id"], "level": name, **counts}


def table(rows: List[dict]) -> str:
    """Counts and fractions per level, over all images."""
    totals: Dict[str, Counter] = {}
    for row in rows:
        for name in (row["level"], "all"):
            totals.setdefault(name, Counter()).update({key: row[key] for key in COUNTS})
    lines = []
    for name in [*(name for name in totals if name != "all"), "all"]:
        count = totals[name]
        negatives = count["positions"] - count["positives"]
        at_negatives = count["conflicts"] - count["positive_conflicts"]
        lines.append(
            [
                name,
                str(count["positions"]),
                _fraction(count["conflicts"], count["positions"]),
                str(count["positives"]),
                _fraction(count["positive_conflicts"], count["positives"]),
                _fraction(at_negatives, negatives),
            ]
        )
    header = ["level", "positions", "in conflict", "positives", "of these", "of negatives"]
    return markdown_table(header, lines)


def _fraction(part: int, whole: int) -> str:
    return f"{part / whole:.4f}" if whole else "nan"


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse_arguments(arguments)
    with short_errors():
        cfg, dataset = prepare(args)
        classes = class_index(args.label, dataset_classes(dataset))
        student, teacher = freeze(student_of(cfg, args.weights)), teacher_of(cfg)
        observer = Observer(student, teacher, *PREDICTIONS)
        drawn_levels = chosen_levels(args.levels, student.anchor_generator.strides)
        records = load_images(cfg, dataset, args.images, args.num_images)
    rows, pictures = [], []
    for record in tqdm(records, desc="conflict maps"):
        batch = DenseBatch(observer([record]))
        with short_errors():
            levels = conflict_maps(batch, args.threshold, args.target)
        rows += [row_of(record, level_name(x.stride), count_conflicts([x])) for x in levels]
        name = os.path.join(args.output, f"conflicts_{record['index']:05d}")
        boxes = record["instances"].gt_boxes.tensor.numpy()
        np.savez_compressed(f"{name}.npz", boxes=boxes, **arrays(levels))
        if len(pictures) < args.pictures:
            drawn = [levels[i] for i in drawn_levels]
            picture(f"{name}.png", record, drawn, classes, student.anchor_generator.offset, cfg)
            pictures.append(os.path.basename(f"{name}.png"))
    with open(os.path.join(args.output, "fractions.csv"), "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    text = (
        f"{len(records)} images of {dataset}. A position (anchor) is in conflict where target and "
        f"teacher differ by more than {args.threshold} in some class."
    )
    with open(os.path.join(args.output, "table.md"), "w") as f:
        f.write(f"{text}\n\n{table(rows)}\n")
    with open(os.path.join(args.output, "index.html"), "w") as f:
        f.write(html_page("CrossKD: target conflicts", text, table(rows), pictures))
    print(f"{text}\n\n{table(rows)}\n\nwritten to {args.output}")


if __name__ == "__main__":
    main()
