#!/usr/bin/env python
"""Time and memory of a distillation step against its parts, on random images.

    python benchmarks/step_time.py --table --rounds 40 --output step_time.json
    python benchmarks/step_time.py --config-file benchmarks/configs/gfl_r18_r50.yaml \\
        --distillers FitNets PKD LD
    python benchmarks/step_time.py --config-file projects/CrossKD/configs/.../x.yaml \\
        MODEL.WEIGHTS "" KD.TEACHER.WEIGHTS "" KD.TEACHER.ALLOW_UNTRAINED True

The figure of merit is

    KD step / (student step + teacher forward),

where the teacher forward is that of the plain network, as Detectron2 runs it: normalisation and
padding, backbone, head, in eval mode without gradients. Nothing that the library does to make its
teacher faster or slower is part of the denominator.

Every round runs, one after the other: a student step (forward, backward, optimizer), the plain
teacher forward, the teacher as the distillers use it, the distillers by themselves on stored
tensors (for CrossKD: alignment, cross pass, losses and their backward), the mechanism by itself
(hooks, reading of what they recorded, second assignment), and a full KD step. A ratio is computed
per round, and the median over the rounds is reported with the quartiles, so that drift of the
machine affects all parts alike. "rest" is what no part explains: gradients added up where two
losses meet, memory traffic, noise.

Memory is the peak of a process that runs KD steps minus the peak of one that runs plain student
steps; both start fresh. On the CPU that is the resident set (teacher's weights and everything else
included), on a GPU what the allocator handed out.

A two-stage teacher runs backbone and RoI head, on the boxes that its distillers ask for; its RPN
is no part of it. A classifier of crops (DICOD) runs on the crops of a step. Where the distillers
differentiate it with respect to its crops, this is part of "teacher as used" and not of "teacher
forward". G-DetKD's queue is full from the start, of random rows.

Every config is measured in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
from typing import Any, Callable, Dict, List

import torch
from detectron2.utils.events import EventStorage
from stored_calls import StoredView, note_calls, plain_teacher

from kd_d2 import analysis
from kd_d2.analysis import CLOCKS, random_batch
from kd_d2.data import register_all
from kd_d2.distillation import DistillationContext, Key, teacher_wanted
from kd_d2.engine.main import build_config
from kd_d2.engine.optimizer import build_optimizer
from kd_d2.engine.trainer import KDTrainer
from kd_d2.projects.gdetkd.teacher_queue import TeacherQueue

CONFIGS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs")
TABLE = [os.path.join(CONFIGS, f"{n}_r18_r50.yaml") for n in ("gfl", "retinanet", "fcos", "atss")]
MIB = 2**20
# what the ratio is made of
WHOLE = ("student step", "teacher forward", "KD step")
# groups of keys that a teacher has once it is given boxes or crops
LATER = ("roi", "crops")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", action="append", default=[], help="with KD.ENABLED True; may be repeated"
    )
    parser.add_argument("--table", action="store_true", help="add the four files of configs/")
    parser.add_argument(
        "--distillers",
        nargs="+",
        default=[],
        metavar="NAME",
        help="measure each file with each of these in place of its KD.DISTILLERS",
    )
    parser.add_argument("--image-size", type=int, nargs=2, default=(320, 320), metavar="PIXELS")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: processor time of all threads, for a machine that is not idle",
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="student step, teacher forward and KD step only: for a method whose losses cannot be "
        "computed again from stored tensors, as MimicDetTeacher's",
    )
    parser.add_argument(
        "--memory-steps", type=int, default=5, help="steps whose peak counts; 0: no memory"
    )
    parser.add_argument("--output", default="", help="JSON file for the figures")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    files = args.config_file + (TABLE if args.table else [])
    if not files:
        parser.error("give --config-file or --table")
    runs = [(file, of) for file in files for of in variants(args)]
    for file, of in runs:
        cfg = build_config(file, of.opts)
        if not cfg.KD.ENABLED:
            parser.error(f"{file} has KD.ENABLED False: there is nothing to compare")
        if not teacher_wanted(cfg):
            parser.error(f"{file} has no teacher: there is nothing to compare")
        if args.clock == "cpu" and torch.device(cfg.MODEL.DEVICE).type != "cpu":
            parser.error("--clock cpu does not see what a GPU does")
    results = []
    for file, of in runs:
        figures = _in_fresh_process(measure_time, file, of)
        if args.memory_steps:
            with_kd = _in_fresh_process(measure_peak, file, of, True)
            student = _in_fresh_process(measure_peak, file, of, False)
            figures["memory"] = {
                "student alone": student,
                "KD": with_kd,
                "extra": with_kd - student,
                "teacher's weights": figures.pop("teacher's weights"),
            }
        results.append({"config": os.path.relpath(file), "distiller": of.distiller, **figures})
        print(f"{name(results[-1])}:\n{details(results[-1])}\n", flush=True)
    report = {"environment": environment(args, cfg), "results": results}
    print(headline(report["environment"]) + "\n\n" + table(results))
    if args.output:
        with open(args.output, "w") as f:
            json.dump(report, f, indent=1)
            f.write("\n")


def variants(args: argparse.Namespace) -> List[argparse.Namespace]:
    """``args`` for every one of ``--distillers``, or once for those of the config."""
    result = []
    for name in args.distillers or [""]:
        opts = ["KD.DISTILLERS", f"('{name}',)"] if name else []
        result.append(argparse.Namespace(**{**vars(args), "opts": [*args.opts, *opts]}))
        result[-1].distiller = name
    return result


def _in_fresh_process(function: Callable, *args) -> Any:
    """Call ``function`` in a process that starts with nothing but the imports of this file."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


# ---------------------------------------------------------------------------- what is measured


def set_up_cpu(threads: int) -> None:
    """As many threads as asked for (0: torch's default), and denormal numbers are zero.

    Gradients through random weights of N(0, 0.01) become denormal numbers, with which a CPU takes
    several times as long. Threads take that setting from the one that starts them: call this before
    anything is computed.
    """
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)


def _prepared(file: str, args, distil: bool):
    """Network in training mode, its optimizer and a batch."""
    set_up_cpu(args.threads)
    cfg = build_config(file, args.opts).clone()
    cfg.defrost()
    cfg.KD.ENABLED = distil
    cfg.freeze()
    register_all(cfg)  # the classes of an untrained classifier; no file is read
    torch.manual_seed(0)
    model = KDTrainer.build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # random labels: keep the weights where they are
    fill_queues(model)
    network = model.student if distil else model
    num_classes = getattr(network, "roi_heads", network).num_classes
    return cfg, model, optimizer, random_batch(args.batch_size, *args.image_size, num_classes)


def fill_queues(model: torch.nn.Module) -> None:
    """As after many steps: a queue that is not full costs less time, and its pages no memory."""
    for queue in (m for m in model.modules() if isinstance(m, TeacherQueue)):
        # in parts: random rows for all of it would be the peak of the memory
        for part in queue.rows.split(1024):
            queue.push(torch.rand_like(part), [len(part)])


def _step(network: Callable, optimizer, batch) -> None:
    losses = network(batch)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()


def measure_peak(file: str, args, distil: bool) -> float:
    """Peak memory of this process, MiB, after a few steps of the student with or without KD."""
    cfg, model, optimizer, batch = _prepared(file, args, distil)
    with EventStorage(0):
        for _ in range(args.memory_steps):
            _step(model, optimizer, batch)
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def _needs(model, side: str):
    return set().union(*(getattr(distiller, side) for distiller in model.distillers.values()))


def measure_time(file: str, args) -> Dict[str, Any]:
    """Seconds of every part, their ratios, and the size of the teacher's weights."""
    cfg, model, optimizer, batch = _prepared(file, args, distil=True)
    with EventStorage(0):
        with model.tap.observe(model.student, model._student_needs, check=False) as observation:
            model.student(batch)
        ctx = model._context(batch, observation, 0)
        ctx.teacher = calls = note_calls(model, ctx.teacher)
        for distiller in model.distillers.values():
            distiller(ctx)
        _, teacher_forward = plain_teacher(cfg, model, calls)
        # there are no values of boxes and crops before these are given
        teacher_keys = [k for k in model._teacher_needs if Key.parse(k).group not in LATER]
        views = {
            "student": StoredView(ctx.student, _needs(model, "student_needs"), True),
            "teacher": calls.view(teacher_keys),
        }

        def distillers():
            stored = DistillationContext(
                batched_inputs=batch,
                gt_instances=ctx.gt_instances,
                padded_size=ctx.padded_size,
                iteration=0,
                images=ctx.images,
                **views,
            )
            terms = [v for d in model.distillers.values() for v in d(stored).values()]
            sum(terms).backward()

        def teacher():
            run = model.teacher.start(batch, ctx.padded_size, model._teacher_needs)
            for key in teacher_keys:
                run[key]
            calls.replay(run)

        def mechanism():
            with model.tap.observe(model.student, model._student_needs, check=False):
                pass  # hooks are set and removed
            observation._values.clear()
            for key in views["student"].keys:
                ctx.student[key]

        parts = {
            "student step": lambda: _step(model.student, optimizer, batch),
            "teacher forward": lambda: teacher_forward(batch),
            "teacher as used": teacher,
            "distillers": distillers,
            "mechanism": mechanism,
            "KD step": lambda: _step(model, optimizer, batch),
        }
        if args.whole:
            parts = {name: parts[name] for name in WHOLE}
        times = interleaved(parts, args)
    weights = model.teacher.model.state_dict().values()
    return {**summary(times), "teacher's weights": sum(w.nbytes for w in weights) / MIB}


def interleaved(parts: Dict[str, Callable], args) -> Dict[str, List[float]]:
    """Seconds of each part in each round, as the command line says."""
    return analysis.interleaved(parts, args.rounds, args.warmup, CLOCKS[args.clock])


def summary(times: Dict[str, List[float]]) -> Dict[str, Any]:
    """Medians and quartiles of the parts and of what is computed per round.

    Args:
        times: part -> seconds of each round; the parts of :func:`measure_time`, or ``WHOLE``.
    """
    rounds = [dict(zip(times, values)) for values in zip(*times.values())]
    used = ("student step", "teacher as used", "distillers", "mechanism")
    if set(used) <= set(times):
        rest = [r["KD step"] - sum(r[name] for name in used) for r in rounds]
        times = {**times, "rest": rest}
    ratio = [r["KD step"] / (r["student step"] + r["teacher forward"]) for r in rounds]
    return {
        "ratio": spread(ratio),
        "seconds": {name: spread(values) for name, values in times.items()},
    }


def spread(values: List[float]) -> Dict[str, float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "quartiles": [low, high]}


# ------------------------------------------------------------------------------------ reports
def environment(args, cfg) -> Dict[str, Any]:
    return {
        "device": analysis.device_name(cfg.MODEL.DEVICE),
        "threads": args.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "batch": args.batch_size,
        "image size": list(args.image_size),
        "rounds": args.rounds,
        "clock": args.clock,
        "opts": args.opts,
    }


def headline(env: Dict[str, Any]) -> str:
    size = "x".join(map(str, env["image size"]))
    return (
        f"{env['batch']} images of {size}, {env['device']}, {env['threads']} threads, "
        f"torch {env['torch']}, {env['clock']} clock, medians of {env['rounds']} interleaved rounds"
    )


def details(result: Dict[str, Any]) -> str:
    lines = [
        f"  {name:<42} {value['median']:9.4f} s   ({span(value, 4)})"
        for name, value in result["seconds"].items()
    ]
    ratio = result["ratio"]
    name = "KD step / (student step + teacher forward)"
    lines.append(f"  {name:<42} {ratio['median']:9.3f}     ({span(ratio, 3)})")
    for name, value in result.get("memory", {}).items():
        lines.append(f"  {'memory: ' + name:<42} {value:9.0f} MiB")
    return "\n".join(lines)


def span(value: Dict[str, Any], digits: int) -> str:
    low, high = value["quartiles"]
    return f"{low:.{digits}f} to {high:.{digits}f}"


def name(result: Dict[str, Any]) -> str:
    """Name of a row: the file's, and the distiller's if it was given."""
    file = os.path.splitext(os.path.basename(result["config"]))[0]
    return " ".join(part for part in (file, result.get("distiller", "")) if part)


_COLUMNS = ("student step", "teacher forward", "teacher as used", "distillers", "KD step")


def table(results: List[Dict[str, Any]]) -> str:
    """Markdown table, one row per config; quartiles of the ratio in brackets."""
    header = ["config", *(f"{c}, s" for c in _COLUMNS), "ratio", "extra memory, MiB"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for result in results:
        found = result["seconds"]
        seconds = [f"{found[c]['median']:.3f}" if c in found else "" for c in _COLUMNS]
        ratio = f"{result['ratio']['median']:.3f} ({span(result['ratio'], 3)})"
        memory = result.get("memory")
        extra = "" if memory is None else f"{memory['extra']:+.0f}"
        rows.append([name(result), *seconds, ratio, extra])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
