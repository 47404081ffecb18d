#!/usr/bin/env python
r"""Detections of teacher, students and ground truth side by side (Fig. 7).

    python projects/CrossKD/tools/compare_detections.py --config-file CONFIG --output detections \
        --model student=plain/model_final.pth --model CrossKD=crosskd/model_final.pth \
        KD.TEACHER.WEIGHTS TEACHER.pth

One row an image: teacher | the models in their order | ground truth. Writes detections.png, and
detections.csv with all boxes in pixels of the original images, also those below the threshold.
"""

import csv
import os
from typing import Dict, List, Optional, Sequence

import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode, Instances
from tqdm import tqdm

from kd_d2.data import dataset_classes
from kd_d2.engine.analysis_command import add_titled, parse, parser, prepare, teacher_of
from kd_d2.engine.main import short_errors
from kd_d2.projects.crosskd.analysis.images import load_images, rgb_picture
from kd_d2.projects.crosskd.analysis.observer import student_of
from kd_d2.visualization import draw_detections

COLUMNS = ("index", "image_id", "network", "class", "score", "x0", "y0", "x1", "y1")


def parse_arguments(arguments: Optional[Sequence[str]] = None):
    result = parser(__doc__, num_images=4)
    add_titled(result, "--model", "FILE", "checkpoint of the config's student")
    result.add_argument(
        "--score-threshold",
        type=float,
        default=0.3,
        metavar="S",
        help="weaker detections are not drawn (default: %(default)s)",
    )
    return parse(result, arguments)


@torch.no_grad()
def detect(model, cfg, dataset: str, args, title: str) -> List[Instances]:
    """Detections of every image, each network with its own input size and channel order."""
    records = load_images(cfg, dataset, args.images, args.num_images)
    model.eval()
    bar = tqdm(records, desc=title)
    return [model([record])[0]["instances"].to("cpu") for record in bar]


def truth(records, dataset: str) -> None:
    """Give the records of :func:`load_images` the annotations of the data set."""
    annotated: Dict = {r["image_id"]: r["annotations"] for r in DatasetCatalog.get(dataset)}
    for record in records:
        record["annotations"] = annotated[record["image_id"]]


def rows_of(record, network: str, found: Instances) -> List[list]:
    boxes, classes = found.pred_boxes.tensor.tolist(), found.pred_classes.tolist()
    head = [record["index"], record["image_id"], network]
    return [
        [*head, label, score, *box]
        for label, score, box in zip(classes, found.scores.tolist(), boxes)
    ]


def truth_rows(record) -> List[list]:
    return [
        [
            record["index"],
            record["image_id"],
            "ground truth",
            annotation["category_id"],
            1.0,
            *BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS),
        ]
        for annotation in record["annotations"]
    ]


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse_arguments(arguments)
    with short_errors():
        cfg, dataset = prepare(args)
        teacher = teacher_of(cfg)
        networks = [("teacher", teacher.model, teacher.cfg)]
        networks += [(title, student_of(cfg, path), cfg) for title, path in args.model]
        records = load_images(cfg, dataset, args.images, args.num_images)
        truth(records, dataset)
        names = dataset_classes(dataset)
    columns = [
        (title, detect(model, own_cfg, dataset, args, title)) for title, model, own_cfg in networks
    ]
    rows = []
    for i, record in enumerate(records):
        for title, found in columns:
            rows += rows_of(record, title, found[i])
        rows += truth_rows(record)
        picture = rgb_picture(record, cfg.INPUT.FORMAT)
        record["image"] = torch.from_numpy(picture).permute(2, 0, 1)
    with open(os.path.join(args.output, "detections.csv"), "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    path = os.path.join(args.output, "detections.png")
    draw_detections(records, columns, path, args.score_threshold, names, truth_last=True)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
