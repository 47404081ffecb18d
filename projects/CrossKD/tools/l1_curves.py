#!/usr/bin/env python
r"""Distances of students to teacher and ground truth in the course of their training (Fig. 5).

    python projects/CrossKD/tools/l1_curves.py --config-file CONFIG --output curves \
        --run baseline=output/plain --run mimic=output/mimic --run CrossKD=output/crosskd \
        KD.TEACHER.WEIGHTS TEACHER.pth

Every model_<iteration>.pth of the folders is measured on the images: |p^s - p^t| and |p^s - p^gt|
of both branches (definitions: kd_d2.projects.crosskd.analysis.l1_curves) and AP on the same
images. Writes curves.csv after every checkpoint, and curves.png. All runs have the student of
--config-file and are measured against its teacher.
"""

import contextlib
import csv
import os
from typing import Dict, List, Optional, Sequence

import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from tqdm import tqdm

from kd_d2.checkpoint import load_weights
from kd_d2.data import build_sample_loader
from kd_d2.distillation import freeze
from kd_d2.engine.analysis_command import add_titled, parse, parser, prepare, teacher_of
from kd_d2.engine.main import short_errors
from kd_d2.evaluation import build_sample_evaluator
from kd_d2.projects.crosskd.analysis.dense import DenseBatch
from kd_d2.projects.crosskd.analysis.images import load_images
from kd_d2.projects.crosskd.analysis.l1_curves import L1Distances, find_checkpoints
from kd_d2.projects.crosskd.analysis.observer import PREDICTIONS, Observer
from kd_d2.projects.crosskd.analysis.pictures import draw_panels

PANELS = {
    "cls_teacher": "(a) scores, to teacher",
    "reg_teacher": "(a) boxes, to teacher [strides]",
    "cls_gt": "(b) scores, to ground truth",
    "reg_gt": "(b) boxes, to ground truth [strides]",
    "AP": "(c) AP",
}


def parse_arguments(arguments: Optional[Sequence[str]] = None):
    result = parser(__doc__, num_images=5000)
    add_titled(result, "--run", "FOLDER", "output folder of a training run")
    result.add_argument("--no-ap", action="store_true", help="distances only")
    result.add_argument(
        "--resume",
        action="store_true",
        help="keep what curves.csv in the output folder has of the same files and images",
    )
    return parse(result, arguments)


def distances(student, teacher, records) -> Dict[str, float]:
    """Means of all measures at the student's present weights."""
    result = L1Distances()
    observer = Observer(student, teacher, *PREDICTIONS)
    for record in records:
        result.add(DenseBatch(observer([record])))
    return result.means()


def average_precision(cfg, student, dataset: str, num_images: int, folder: str) -> float:
    """COCO's AP (percent) on evenly spaced images."""
    student.eval()
    with open(os.path.join(folder, "evaluation.txt"), "a") as f, contextlib.redirect_stdout(f):
        results = inference_on_dataset(
            student,
            build_sample_loader(cfg, dataset, num_images),
            build_sample_evaluator(cfg, dataset, os.path.join(folder, "inference")),
        )
    return float(results["bbox"]["AP"])


def measure(args, cfg, student, teacher, records, dataset: str, path: str) -> Dict[str, float]:
    """Everything about one checkpoint."""
    with short_errors():
        load_weights(student, path, cfg.KD.ALLOW_UNSAFE_LOAD)
    result = distances(student, teacher, records)
    if not args.no_ap:
        with torch.no_grad():
            result["AP"] = average_precision(cfg, student, dataset, args.num_images, args.output)
    return result


def write(rows: List[dict], path: str) -> None:
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def earlier(path: str, images: str, no_ap: bool) -> Dict[tuple, dict]:
    """Rows of an earlier call by (run, checkpoint), those of the same images only."""
    if not os.path.isfile(path):
        return {}
    with open(path, newline="") as f:
        rows = [row for row in csv.DictReader(f) if row.get("images") == images]
    result = {}
    for row in rows:
        if ("AP" in row) != no_ap:
            numbers = {name: float(row[name]) for name in PANELS if name in row}
            values = {**row, **numbers, "iteration": int(row["iteration"])}
            result[row["run"], row["checkpoint"]] = values
    return result


def draw(rows: List[dict], path: str) -> None:
    panels = []
    for name, title in PANELS.items():
        if name not in rows[0]:
            continue
        curves: Dict[str, list] = {}
        for row in rows:
            curves.setdefault(row["run"], []).append((row["iteration"], row[name]))
        panels.append((title, curves))
    draw_panels(path, panels, "iteration")


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse_arguments(arguments)
    with short_errors():
        if args.images and not args.no_ap:
            raise ValueError("AP is measured on evenly spaced images; use --num-images, or --no-ap")
        cfg, dataset = prepare(args)
        runs = [(title, find_checkpoints(folder)) for title, folder in args.run]
        student, teacher = freeze(build_model(cfg)), teacher_of(cfg)
        Observer(student, teacher, *PREDICTIONS)  # complains now rather than after loading
        records = load_images(cfg, dataset, args.images, args.num_images)
    table = os.path.join(args.output, "curves.csv")
    images = f"{dataset}: {args.images or len(records)}"
    known = earlier(table, images, args.no_ap) if args.resume else {}
    rows: List[dict] = []
    with tqdm(total=sum(len(checkpoints) for _, checkpoints in runs), desc="checkpoints") as bar:
        for title, checkpoints in runs:
            for iteration, path in checkpoints:
                bar.set_postfix_str(f"{title}, iteration {iteration}")
                if (title, path) in known:
                    rows.append(known[title, path])
                else:
                    head = {"run": title, "iteration": iteration}
                    values = measure(args, cfg, student, teacher, records, dataset, path)
                    rows.append({**head, **values, "images": images, "checkpoint": path})
                write(rows, table)
                bar.update()
    picture = os.path.join(args.output, "curves.png")
    draw(rows, picture)
    print(f"written: {table}, {picture}")


if __name__ == "__main__":
    main()
