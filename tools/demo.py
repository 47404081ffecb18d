#!/usr/bin/env python
"""Distil a small detector on the embedded digit scenes and show what it gained.

Trains a teacher, a plain student and a CrossKD student with the same seed and schedule, evaluates
all three with COCO AP, and writes a table, pictures and a page to look at. Everything that is
finished is kept: started again, the demo goes on where it was interrupted.
"""

import argparse
import contextlib
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

import torch
from detectron2.data import DatasetCatalog

from kd_d2.checkpoint import KDCheckpointer
from kd_d2.data import build_sample_loader
from kd_d2.engine.experiment import finished_result, prepare_data, train_once
from kd_d2.engine.main import build_config
from kd_d2.engine.trainer import KDTrainer
from kd_d2.visualization import draw_curves, draw_detections, html_page, markdown_table

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
TEACHER = "configs/DigitScenes/gfl_r34_teacher.yaml"


@dataclass
class Run:
    """One network of the comparison."""

    name: str
    title: str
    config: str


RUNS = [
    Run("teacher", "teacher (ResNet-34)", TEACHER),
    Run("plain", "student (ResNet-18), plain", "configs/DigitScenes/gfl_r18.yaml"),
    Run(
        "crosskd",
        "student (ResNet-18), CrossKD",
        "projects/CrossKD/configs/DigitScenes/crosskd_gfl_r18_r34.yaml",
    ),
]

# a run of two minutes that shows that everything works, not that distillation helps
QUICK = [
    "SOLVER.MAX_ITER", "30", "SOLVER.STEPS", "(20,)", "SOLVER.WARMUP_ITERS", "10",
    "SOLVER.CHECKPOINT_PERIOD", "30", "TEST.EVAL_PERIOD", "0", "KD.EVAL_TEACHER", "never",
    "DATASETS.DIGIT_SCENES.NUM_TRAIN", "200", "DATASETS.DIGIT_SCENES.NUM_VAL", "40",
]  # fmt: skip


def main() -> None:
    args = parse_args()
    os.makedirs(args.output_dir, exist_ok=True)
    torch.set_num_threads(args.threads)
    print(f"demo: everything is written to {args.output_dir}", flush=True)
    results = {}
    for run in RUNS:
        results[run.name] = train(run, args)
    path = report(results, args)
    print(f"\n{table(results)}\n\nlook at {path}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", default="demo_output", metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="two minutes, results mean nothing")
    parser.add_argument("--seed", type=int, default=1, help="of all three networks")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    args = parser.parse_args()
    if args.quick and args.output_dir == parser.get_default("output_dir"):
        args.output_dir += "_quick"
    return args


def config_of(run: Run, args: argparse.Namespace):
    opts = ["OUTPUT_DIR", os.path.join(args.output_dir, run.name), "SEED", str(args.seed)]
    if run.config != TEACHER:
        opts += ["KD.TEACHER.WEIGHTS", os.path.join(args.output_dir, "teacher", "model_final.pth")]
    return build_config(os.path.join(ROOT, run.config), opts + (QUICK if args.quick else []))


def train(run: Run, args: argparse.Namespace) -> Dict[str, Any]:
    """Train and evaluate one network, or read the result of an earlier call."""
    cfg = config_of(run, args)
    prepare_data(cfg)
    before = finished_result(cfg) is not None
    result = train_once(cfg, run.title)
    done = "done before, " if before else ""
    print(f"{run.title:<30}: {done}AP {result['metrics']['AP']:.2f}", flush=True)
    return result


def table(results: Dict[str, Dict[str, Any]]) -> str:
    rows = [
        [
            run.title,
            *(f"{results[run.name]['metrics'][key]:.2f}" for key in ("AP", "AP50", "AP75")),
            f"{results[run.name]['parameters'] / 1e6:.2f}",
            str(results[run.name]["iterations"]),
            f"{results[run.name]['seconds']:.0f}"
            + (" (since resumed)" if results[run.name]["resumed"] else ""),
        ]
        for run in RUNS
    ]
    header = ["network", "AP", "AP50", "AP75", "parameters (M)", "iterations", "seconds"]
    return markdown_table(header, rows)


def report(results, args) -> str:
    """Write table, pictures and page; return the path of the page."""
    folder = args.output_dir
    students = [(run.title, os.path.join(folder, run.name, "metrics.json")) for run in RUNS]
    draw_curves(students, os.path.join(folder, "curves.png"))
    images, columns = detections(args)
    picture = os.path.join(folder, "detections.png")
    draw_detections(images, columns, picture, score_threshold=0.4)
    gain = results["crosskd"]["metrics"]["AP"] - results["plain"]["metrics"]["AP"]
    text = (
        f"Seed {args.seed}: CrossKD changes the AP of the student by {gain:+.2f}. "
        "All networks were trained from scratch on generated scenes with handwritten digits."
    )
    if args.quick:
        text = "QUICK run: it shows that everything works; the numbers mean nothing. " + text
    markdown = table(results)
    with open(os.path.join(folder, "results.md"), "w") as f:
        f.write(f"{text}\n\n{markdown}\n")
    page = os.path.join(folder, "index.html")
    with open(page, "w") as f:
        f.write(html_page("kd_d2: demo", text, markdown, ["detections.png", "curves.png"]))
    return page


def detections(args, num_images: int = 6) -> Tuple[List[dict], List[Tuple[str, list]]]:
    """Validation images with ground truth, and the detections of each network on them."""
    columns = []
    inputs: List[dict] = []
    for run in RUNS:
        cfg = config_of(run, args)
        with open(os.devnull, "w") as f, contextlib.redirect_stdout(f):
            model = KDTrainer.build_student(cfg).eval()
            weights = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
            KDCheckpointer(model).load(weights)
            loader = build_sample_loader(cfg, cfg.DATASETS.TEST[0], num_images)
            with torch.no_grad():
                batches = list(loader)
                outputs = [model(batch)[0]["instances"].to("cpu") for batch in batches]
        inputs = inputs or [batch[0] for batch in batches]
        columns.append((run.title, outputs))
    records = {r["image_id"]: r for r in DatasetCatalog.get("digit_scenes_val")}
    for item in inputs:
        item["annotations"] = records[item["image_id"]]["annotations"]
    return inputs, columns


if __name__ == "__main__":
    main()
