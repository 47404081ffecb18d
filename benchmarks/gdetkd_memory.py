#!/usr/bin/env python
"""Memory of G-DetKD's two large terms, SGFI and CKD, by number of RoIs and size of the chunks.

    python benchmarks/gdetkd_memory.py --rois 256 1024 --chunks 0 64 256

"Kept" is what autograd keeps from the forward pass for the backward: the distinct storages, inputs
and weights included. "Peak" is the highest resident set during forward and backward minus that
before them, so inputs, weights and the queue are not in it. Networks as in the paper: 256 channels,
7x7 cells, 5 levels, representations of 1024, a full queue of 81920 rows. Every row of the table is
measured in a process of its own, on the CPU, in fp32.
"""

import argparse
import json
import multiprocessing
import threading
import time
from typing import Callable, Dict, List, Tuple

import torch
from detectron2.structures import Boxes
from torch.autograd.graph import saved_tensors_hooks

from kd_d2.projects.gdetkd.ckd import ContrastiveKD
from kd_d2.projects.gdetkd.sgfi import SGFI
from kd_d2.visualization import markdown_table

MIB = 2**20
CHANNELS, SIZE, LEVELS, WIDTH, QUEUE = 256, 7, 5, 1024, 81920


def sgfi(rois: int, chunk: int) -> Callable[[], torch.Tensor]:
    """A function that runs SGFI forward on random features and returns its loss."""
    module = SGFI(
        student_channels=CHANNELS, teacher_channels=CHANNELS, num_levels=LEVELS, chunk=chunk
    )
    student = torch.randn(rois, LEVELS, CHANNELS, SIZE, SIZE, requires_grad=True)
    teacher = torch.randn(rois, CHANNELS, SIZE, SIZE)
    return lambda: module(student, teacher).loss


def ckd(rois: int, chunk: int, queue_dtype: str = "float32") -> Callable[[], torch.Tensor]:
    """The same for CKD: two images, boxes of 50 pixels, a full queue."""
    module = ContrastiveKD(
        student_dim=WIDTH,
        teacher_dim=WIDTH,
        queue_size=QUEUE,
        queue_dtype=queue_dtype,
        chunk=chunk,
    )
    module.queue.push(torch.randn(QUEUE, WIDTH), [QUEUE])
    student = torch.randn(rois, WIDTH, requires_grad=True)
    teacher = torch.randn(rois, WIDTH)
    corners = torch.rand(rois, 2) * 700
    boxes = [Boxes(x) for x in torch.cat([corners, corners + 50], dim=1).split(rois - rois // 2)]
    return lambda: module(student, teacher, boxes).loss


TERMS = {"SGFI": sgfi, "CKD": ckd, "CKD, fp16 queue": lambda n, c: ckd(n, c, "float16")}


def resident() -> int:
    """Resident set of this process, bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def measure(job: Tuple[str, int, int]) -> Dict[str, float]:
    """Measure one term; to be called in a fresh process."""
    name, rois, chunk = job
    torch.manual_seed(0)
    loss = TERMS[name](rois, chunk)
    kept: Dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    start = resident()
    peak, done = start, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        value.backward()
    finally:
        done.set()
        thread.join()
    return {
        "term": name,
        "rois": rois,
        "chunk": chunk,
        "kept_mib": sum(kept.values()) / MIB,
        "peak_mib": (peak - start) / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rois", nargs="+", type=int, default=[256, 1024], metavar="N")
    parser.add_argument("--chunks", nargs="+", type=int, default=[0, 64, 256], metavar="N")
    parser.add_argument("--terms", nargs="+", choices=TERMS, default=list(TERMS))
    parser.add_argument("--output", metavar="FILE", help="JSON with the figures")
    args = parser.parse_args()
    jobs = [(t, n, c) for t in args.terms for n in args.rois for c in args.chunks]
    context = multiprocessing.get_context("spawn")
    results: List[Dict[str, float]] = []
    for index, job in enumerate(jobs):
        with context.Pool(1) as pool:
            results.append(pool.apply(measure, (job,)))
        print(f"{index + 1} of {len(jobs)}: {results[-1]}", flush=True)
    rows = [
        [r["term"], str(r["rois"]), str(r["chunk"])]
        + [f"{r[name]:.0f}" for name in ("kept_mib", "peak_mib")]
        for r in results
    ]
    print(markdown_table(["term", "RoIs", "chunk", "kept, MiB", "peak, MiB"], rows))
    if args.output:
        with open(args.output, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
