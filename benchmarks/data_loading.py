#!/usr/bin/env python
"""How many images a second the training loader gives, and where a mapper's time goes.

    python benchmarks/data_loading.py --config-file configs/DigitScenes/gfl_r18.yaml --workers 0 1 2

The loader of the config is run by itself, for --batches batches after a warm-up of two, with every
number of worker processes; a network that trains beside it has less. What limits a run is plain
then: a step of S seconds with B images needs B / S images a second. Reading (opening and decoding
the file) is timed apart from the whole mapper, both in this process.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from typing import Any, Dict, List

from detectron2.config import CfgNode
from detectron2.data import detection_utils, get_detection_dataset_dicts
from tqdm import tqdm

from kd_d2.analysis import device_name
from kd_d2.checkpoint import atomic_write
from kd_d2.data import build_train_loader
from kd_d2.data.loader import build_mapper, evenly_spaced
from kd_d2.engine.experiment import prepare_data
from kd_d2.engine.main import build_config, short_errors
from kd_d2.visualization import markdown_table

WARMUP = 2


def main() -> None:
    args = parse_args()
    with short_errors():
        cfg = build_config(args.config_file, args.opts)
        prepare_data(cfg)
    results = [through_the_loader(cfg, workers, args.batches) for workers in args.workers]
    report = {
        "config": os.path.relpath(args.config_file),
        "processor": f"{device_name('cpu')}, {os.cpu_count()} cores",
        "images a batch": cfg.SOLVER.IMS_PER_BATCH,
        "loader": results,
        "mapper": through_the_mapper(cfg, args.images),
    }
    print(text(report))
    if args.output:
        with atomic_write(args.output) as f:
            f.write(json.dumps(report, indent=1).encode())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], metavar="N")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--images", type=int, default=100, help="for the mapper by itself")
    parser.add_argument("--output", default="", help="JSON file for the figures")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    return parser.parse_args()


def through_the_loader(cfg: CfgNode, workers: int, batches: int) -> Dict[str, Any]:
    """Images a second of the training loader with a number of worker processes."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = workers
    cfg.freeze()
    stream = iter(build_train_loader(cfg))
    for _ in range(WARMUP):
        next(stream)
    images = 0
    start = time.perf_counter()
    for batch in tqdm(itertools.islice(stream, batches), total=batches, desc=f"{workers} workers"):
        images += len(batch)
    seconds = time.perf_counter() - start
    return {"workers": workers, "images a second": images / seconds, "images": images}


def through_the_mapper(cfg: CfgNode, images: int) -> Dict[str, float]:
    """Milliseconds an image: median of the whole mapper, and of reading alone."""
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN)
    records = [records[i] for i in evenly_spaced(len(records), images)]
    mapper = build_mapper(cfg, is_train=True)
    whole: List[float] = []
    reading: List[float] = []
    for record in tqdm(records, desc="mapper"):
        start = time.perf_counter()
        detection_utils.read_image(record["file_name"], format=cfg.INPUT.FORMAT)
        read = time.perf_counter()
        mapper(record)
        reading.append(read - start)
        whole.append(time.perf_counter() - read)
    return {"mapper": 1000 * statistics.median(whole), "reading": 1000 * statistics.median(reading)}


def text(report: Dict[str, Any]) -> str:
    rows = [
        [str(result["workers"]), f"{result['images a second']:.1f}"] for result in report["loader"]
    ]
    mapper = report["mapper"]
    return (
        f"{report['config']}, {report['images a batch']} images a batch, {report['processor']}\n\n"
        f"{markdown_table(['worker processes', 'images a second'], rows)}\n\n"
        f"An image takes {mapper['mapper']:.2f} ms in the mapper, of which reading "
        f"{mapper['reading']:.2f} ms (medians)."
    )


if __name__ == "__main__":
    main()
