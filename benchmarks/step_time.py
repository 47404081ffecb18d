#!/usr/bin/env python
"""Time a distillation step against its parts, on random images, all in one run.

    python benchmarks/step_time.py --config-file projects/CrossKD/configs/.../x.yaml \\
        --image-size 320 320 --batch-size 2 KD.TEACHER.ALLOW_UNTRAINED True KD.TEACHER.WEIGHTS ""

Every round times, one after the other: a plain student step (forward, backward, optimizer), the
teacher stages that the distillers need, the distillers by themselves on stored tensors (for
CrossKD: alignment, cross pass, losses and their backward), the mechanism by itself (hooks, reading
of what they recorded, second assignment), and a full KD step. Medians over the rounds are compared,
so drift of the machine affects all parts alike. "rest" is the median over the rounds of what no
part explains: gradients added up where two losses meet, memory traffic, and noise.
"""

import argparse
import json
import statistics
import time
from typing import Any, Callable, Dict, List

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from kd_d2.distillation import DistillationContext
from kd_d2.engine.main import build_config
from kd_d2.engine.optimizer import build_optimizer
from kd_d2.engine.trainer import KDTrainer


class StoredView:
    """Values of a tap by key, as leaves of the graph, in place of a live student or teacher."""

    def __init__(self, store, keys):
        self._store = store
        self.keys = sorted(keys)
        self._values = {key: _leaves(store[key]) for key in keys}

    def __getitem__(self, key):
        return self._values[key]

    def __getattr__(self, name):
        return getattr(self._store, name)


def _leaves(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.requires_grad_(value.is_floating_point())
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [_leaves(item) for item in value]
    return value


def random_batch(size: int, height: int, width: int, num_classes: int) -> List[Dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(size):
        corners = torch.rand((8, 2), generator=generator) * torch.tensor([width, height]) * 0.7
        sides = (torch.rand((8, 2), generator=generator) * 0.25 + 0.05) * min(height, width)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat((corners, corners + sides), dim=1))
        instances.gt_classes = torch.randint(num_classes, (8,), generator=generator)
        shape = (3, height, width)
        image = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="a config with KD.ENABLED True")
    parser.add_argument("--image-size", type=int, nargs=2, default=(320, 320), metavar="PIXELS")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    parser.add_argument("--output", default="", help="JSON file for the figures")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cfg = build_config(args.config_file, args.opts)
    if not cfg.KD.ENABLED:
        parser.error(f"{args.config_file} has KD.ENABLED False: there is nothing to compare")
    figures = measure(cfg, args)
    report(figures, cfg, args)


def measure(cfg, args) -> Dict[str, float]:
    """Return the median seconds of every part."""
    torch.manual_seed(0)
    model = KDTrainer.build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # random labels: keep the weights where they are
    num_classes = getattr(model.student, "num_classes", None) or cfg.MODEL.ROI_HEADS.NUM_CLASSES
    batch = random_batch(args.batch_size, *args.image_size, num_classes)

    def step(network: Callable):
        losses = network(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    with EventStorage(0):
        with model.tap.observe(model.student, model._student_needs, check=False) as observation:
            model.student(batch)
        ctx = model._context(batch, observation, 0)
        stored = DistillationContext(
            batched_inputs=batch,
            gt_instances=ctx.gt_instances,
            padded_size=ctx.padded_size,
            student=StoredView(ctx.student, set().union(*_needs(model, "student_needs"))),
            teacher=StoredView(ctx.teacher, set().union(*_needs(model, "teacher_needs"))),
            iteration=0,
        )

        def distillers():
            terms = [v for d in model.distillers.values() for v in d(stored).values()]
            sum(terms).backward()

        def teacher():
            run = model.teacher.start(batch, ctx.padded_size, model._teacher_needs)
            for key in model._teacher_needs:
                run[key]

        def mechanism():
            with model.tap.observe(model.student, model._student_needs, check=False):
                pass  # hooks are set and removed
            observation._values.clear()
            for key in stored.student.keys:
                ctx.student[key]

        parts = {
            "student step": lambda: step(model.student),
            "teacher stages": teacher,
            "distillers": distillers,
            "mechanism": mechanism,
            "KD step": lambda: step(model),
        }
        times: Dict[str, List[float]] = {name: [] for name in parts}
        for round_number in range(args.warmup + args.rounds):
            for name, run in parts.items():
                seconds = _timed(run)
                if round_number >= args.warmup:
                    times[name].append(seconds)
    figures = {name: statistics.median(values) for name, values in times.items()}
    *others, total = times.values()
    figures["rest"] = statistics.median(t - sum(o) for t, *o in zip(total, *others))
    return figures


def _needs(model, side: str):
    return [getattr(distiller, side) for distiller in model.distillers.values()]


def _timed(run: Callable) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(figures: Dict[str, float], cfg, args) -> None:
    parts = figures["student step"] + figures["teacher stages"]
    figures["KD step / (student step + teacher stages)"] = figures["KD step"] / parts
    for name in ("mechanism", "rest"):
        figures[f"{name} / KD step"] = figures[name] / figures["KD step"]
    device = torch.cuda.get_device_name() if cfg.MODEL.DEVICE != "cpu" else "CPU"
    size = "x".join(map(str, args.image_size))
    print(f"{args.config_file}: {args.batch_size} images of {size}, {device}, "
          f"{torch.get_num_threads()} threads, median of {args.rounds}")  # fmt: skip
    for name, value in figures.items():
        unit = "" if "/" in name else " s"
        print(f"  {name:<42} {value:9.4f}{unit}")
    if args.output:
        with open(args.output, "w") as f:
            json.dump(figures, f, indent=1)


if __name__ == "__main__":
    main()
