#!/usr/bin/env python
"""Distil a small detector on the embedded digit scenes and show what it gained.

Trains a teacher, a plain student and a CrossKD student with the same seed and schedule, evaluates
all three with COCO AP, and writes a table, pictures and a page to look at. Everything that is
finished is kept: started again, the demo goes on where it was interrupted.
"""

import argparse
import contextlib
import glob
import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from typing import Dict, List, Tuple

import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase, default_setup
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from kd_d2.checkpoint import KDCheckpointer, atomic_write
from kd_d2.data import build_sample_loader, check_datasets, register_all
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


class ProgressBar(HookBase):
    """Iterations, time left and total loss on one terminal line."""

    def __init__(self, title: str):
        self._title = title

    def before_train(self):
        self._bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            desc=f"{self._title:<30}",
            file=sys.__stderr__,
            mininterval=0.5,
        )

    def after_step(self):
        latest = self.trainer.storage.latest()
        if "total_loss" in latest:
            self._bar.set_postfix(loss=f"{latest['total_loss'][0]:.3f}", refresh=False)
        self._bar.update()

    def after_train(self):
        self._bar.close()


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


def train(run: Run, args: argparse.Namespace) -> Dict[str, float]:
    """Train and evaluate one network, or read the result of an earlier call."""
    cfg = config_of(run, args)
    # before logging starts, so that the progress bar of the data set is seen
    register_all(cfg)
    check_datasets(cfg)
    for name in cfg.DATASETS.TRAIN:
        DatasetCatalog.get(name)
    result_file = os.path.join(cfg.OUTPUT_DIR, "result.json")
    fingerprint = cfg.dump()
    if os.path.isfile(result_file):
        with open(result_file) as f:
            stored = json.load(f)
        if stored["config"] == fingerprint:
            print(f"{run.title:<30}: done before, AP {stored['AP']:.2f}", flush=True)
            return stored
    with quiet(cfg.OUTPUT_DIR):
        interrupted = was_started(cfg)
        if not interrupted:
            remove_checkpoints(cfg.OUTPUT_DIR)
        start_logs(cfg)
        trainer = KDTrainer(cfg)
        trainer.register_hooks([ProgressBar(run.title)])
        trainer.resume_or_load(resume=interrupted)
        started = time.time()
        metrics = trainer.train() or trainer._last_eval_results
        result = {
            **{key: metrics["bbox"][key] for key in ("AP", "AP50", "AP75")},
            "parameters": sum(p.numel() for p in trainer.student.parameters()),
            "seconds": time.time() - started,
            "iterations": trainer.max_iter,
            "resumed": trainer.start_iter > 0,
            "config": fingerprint,
        }
    with atomic_write(result_file) as f:
        f.write(json.dumps(result).encode())
    print(f"{run.title:<30}: AP {result['AP']:.2f}", flush=True)
    return result


def was_started(cfg) -> bool:
    """Whether this very run was begun before; Detectron2 writes the config when a run starts."""
    path = os.path.join(cfg.OUTPUT_DIR, "config.yaml")
    if not os.path.isfile(path):
        return False
    with open(path) as f:
        return f.read() == cfg.dump()


def remove_checkpoints(folder: str) -> None:
    """Remove what a run with another config left, so that it is never continued."""
    for path in glob.glob(os.path.join(folder, "model_*.pth")) + [
        os.path.join(folder, "last_checkpoint")
    ]:
        if os.path.isfile(path):
            os.remove(path)


@contextlib.contextmanager
def quiet(folder: str):
    """Send what the COCO tools print to a file; the terminal is for progress."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "stdout.txt"), "a") as f, contextlib.redirect_stdout(f):
        yield


def start_logs(cfg) -> None:
    """Log to the folder of this run only; the terminal shows warnings."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "kd_d2")]
    for logger in loggers:
        logger.handlers.clear()
    default_setup(cfg, argparse.Namespace(config_file="", eval_only=False))
    setup_logger(cfg.OUTPUT_DIR, name="kd_d2", abbrev_name="kd")
    for logger in loggers:
        consoles = [h for h in logger.handlers if type(h) is logging.StreamHandler]
        for handler in consoles:
            logger.removeHandler(handler)
        warnings = logging.StreamHandler(sys.__stderr__)
        warnings.setLevel(logging.WARNING)
        logger.addHandler(warnings)


def table(results: Dict[str, Dict[str, float]]) -> str:
    rows = [
        [
            run.title,
            *(f"{results[run.name][key]:.2f}" for key in ("AP", "AP50", "AP75")),
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
    gain = results["crosskd"]["AP"] - results["plain"]["AP"]
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
        with quiet(cfg.OUTPUT_DIR):
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
