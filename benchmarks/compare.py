#!/usr/bin/env python
"""Compare distillation methods on one data set: same student, schedule and seeds, one table.

Methods are the YAML files of a folder, configs/comparison/<data set> or --configs; plain.yaml is
the one that all others are compared with. The teacher (teacher.yaml, where methods need one) is
trained once, then a student for every (method, seed). Finished runs are kept and an interrupted one
is continued, so that methods and seeds can be added later.
"""

import argparse
import json
import math
import os
import platform
import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode

from kd_d2.checkpoint import atomic_write
from kd_d2.engine.experiment import finished_result, prepare_data, settings, train_once
from kd_d2.engine.main import build_config, short_errors
from kd_d2.visualization import draw_bars, markdown_table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "comparison"
TEACHER, PLAIN = "teacher", "plain"
METRICS = ("AP", "AP50", "AP75")


def main() -> None:
    with short_errors():
        args = parse_args()
        teacher, students = configs(args)
        plain = _config(args, PLAIN, [])
        check_weights([*(() if teacher is None else (teacher,)), *(cfg for _, _, cfg in students)])
        prepare_data(plain)
    torch.set_num_threads(args.threads)
    print(f"compare: everything is written to {args.output}", flush=True)
    taught = None
    if teacher is not None:
        taught = {**facts(train(teacher, TEACHER)), "overrides": overrides(teacher, plain)}
    runs: List[Dict[str, Any]] = []
    for index, (method, seed, cfg) in enumerate(students):
        result = train(cfg, f"{method}, seed {seed}")
        runs.append(
            {"method": method, "seed": seed, "overrides": overrides(cfg, plain), **facts(result)}
        )
        write(args, taught, runs)
        left = time_left(runs, [m for m, _, _ in students[index + 1 :]])
        print(
            f"{index + 1} of {len(students)} students finished, {left / 60:.0f} min left",
            flush=True,
        )
    draw_bars([(args.title, bars(runs))], os.path.join(args.output, "results.png"))
    print(f"\n{Path(args.output, 'results.md').read_text()}")


def parse_args() -> argparse.Namespace:
    names = sorted(path.name for path in FOLDER.iterdir())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--dataset", choices=names, default="digit_scenes")
    where.add_argument("--configs", metavar="DIR", help="another folder with the methods' YAMLs")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all there are")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="N")
    parser.add_argument("--output", metavar="DIR", help="default: output/comparison/<folder>")
    parser.add_argument(
        "--teacher",
        metavar="DIR",
        help="folder of the teacher's run, which comparisons may share; default: OUTPUT/teacher",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE pairs for all networks")
    args = parser.parse_args()
    args.folder = Path(args.configs).resolve() if args.configs else FOLDER / args.dataset
    args.title = title(args.folder)
    with short_errors():
        args.methods = args.methods or methods(args.folder)
    args.output = args.output or os.path.join("output", "comparison", args.title)
    args.teacher = args.teacher or os.path.join(args.output, TEACHER)
    return args


def title(folder: Path) -> str:
    """Path of a folder of methods inside this repository without "configs/comparison"."""
    if ROOT not in folder.parents:
        return folder.name
    parts = folder.relative_to(ROOT).parts
    return "/".join(part for part in parts if part not in ("configs", "comparison"))


def methods(folder: Path) -> List[str]:
    """Names of the methods with a YAML, the student alone first.

    Raises:
        FileNotFoundError: there is no student alone in ``folder``.
    """
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if PLAIN not in names:
        raise FileNotFoundError(f"{folder} has no {PLAIN}.yaml, the student without any teacher")
    return [PLAIN, *(name for name in names if name not in (PLAIN, TEACHER))]


def configs(
    args: argparse.Namespace,
) -> Tuple[Optional[CfgNode], List[Tuple[str, int, CfgNode]]]:
    """Configs of the teacher, if there is one, and of all students, in the order of training.

    All methods of a seed come before the next seed, so that a comparison can be read early.

    Raises:
        ValueError: there is no such method.
    """
    known = methods(args.folder)
    for name in args.methods:
        if name not in known:
            raise ValueError(f"--methods has '{name}'; {args.title} has {', '.join(known)}")
    teacher, taught_by = None, []
    if (args.folder / f"{TEACHER}.yaml").is_file():
        teacher = _config(args, TEACHER, ["OUTPUT_DIR", args.teacher])
        taught_by = ["KD.TEACHER.WEIGHTS", os.path.join(args.teacher, "model_final.pth")]
    students = []
    for seed in args.seeds:
        for name in args.methods:
            folder = os.path.join(args.output, f"{name}_seed{seed}")
            opts = ["OUTPUT_DIR", folder, "SEED", str(seed), *taught_by]
            students.append((name, seed, _config(args, name, opts)))
    return teacher, students


def _config(args: argparse.Namespace, name: str, opts: List[str]) -> CfgNode:
    return build_config(str(args.folder / f"{name}.yaml"), [*args.opts, *opts])


def check_weights(cfgs: Sequence[CfgNode]) -> None:
    """See that initial weights that are local files are there before hours of training.

    Raises:
        FileNotFoundError: names the first that is not.
    """
    for path in (cfg.MODEL.WEIGHTS for cfg in cfgs):
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(
                f"MODEL.WEIGHTS is {path}, which does not exist (relative to the folder where the "
                "program is started); the comment beside it in the YAML says how it is made"
            )


def train(cfg: CfgNode, title: str) -> Dict[str, Any]:
    """:func:`train_once` with a line on the terminal."""
    before = finished_result(cfg)
    result = train_once(cfg, title)
    done = "" if before is None else "done before, "
    print(f"{title:<30}: {done}AP {result['metrics']['AP']:.2f}", flush=True)
    return result


def facts(result: Dict[str, Any]) -> Dict[str, Any]:
    """What a result says for the record; settings are told by the overrides instead."""
    kept = {key: value for key, value in result.items() if key != "settings"}
    # JSON has no nan, which is the AP of objects of a size that there are none of
    metrics = {key: value for key, value in result["metrics"].items() if math.isfinite(value)}
    return {**kept, "metrics": metrics}


def overrides(cfg: CfgNode, plain: CfgNode) -> Dict[str, str]:
    """Settings in which a run differs from the student alone, the seed aside."""
    own, other = settings(cfg), settings(plain)
    return {k: v for k, v in own.items() if other.get(k) != v and k not in ("SEED", "teacher")}


def time_left(runs: Sequence[Dict[str, Any]], todo: Sequence[str]) -> float:
    """Seconds for the methods in ``todo``: what each took so far, or all of them on average."""
    overall = statistics.mean(run["seconds"] for run in runs)
    spent = {m: [run["seconds"] for run in runs if run["method"] == m] for m in set(todo)}
    return sum(statistics.mean(spent[m]) if spent[m] else overall for m in todo)


def mean_sd(values: Sequence[float]) -> Tuple[float, float]:
    """Mean and standard deviation of a sample (divisor n - 1); nan for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def summary(runs: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """One entry per method, in the order of their first runs.

    Returns:
        entries with ``method``, ``seeds``, ``seconds`` (mean of the runs not resumed) and for each
        metric ``metric: (mean, sd)`` and ``metric gain: (mean, sd)`` of the differences to the
        student alone with the same seed; None where that is missing.
    """
    table: Dict[str, Dict[int, Dict[str, Any]]] = {}
    for run in runs:
        table.setdefault(run["method"], {})[run["seed"]] = run
    plain = table.get(PLAIN, {})
    result = []
    for method, by_seed in table.items():
        whole = [run["seconds"] for run in by_seed.values() if not run["resumed"]]
        entry = {"method": method, "seeds": sorted(by_seed)}
        entry["seconds"] = statistics.mean(whole) if whole else None
        paired = [seed for seed in by_seed if seed in plain and method != PLAIN]
        for name in METRICS:
            values = {seed: run["metrics"].get(name, math.nan) for seed, run in by_seed.items()}
            entry[name] = mean_sd(list(values.values()))
            gains = [values[seed] - plain[seed]["metrics"].get(name, math.nan) for seed in paired]
            entry[f"{name} gain"] = mean_sd(gains) if gains else None
        result.append(entry)
    return result


def markdown(runs: Sequence[Dict[str, Any]]) -> str:
    """The table: AP of every seed, means with standard deviations, gains over the student alone."""
    entries = summary(runs)
    seeds = sorted({seed for entry in entries for seed in entry["seeds"]})
    values = {(run["method"], run["seed"]): run["metrics"].get("AP") for run in runs}
    header = ["method", *(f"AP, seed {seed}" for seed in seeds)]
    header += [*METRICS, *(f"gain in {name}" for name in METRICS), "seconds a run"]
    rows = []
    for entry in entries:
        row = [entry["method"]]
        row += [_number(values.get((entry["method"], seed))) for seed in seeds]
        row += [_number(entry[name]) for name in METRICS]
        row += [_number(entry[f"{name} gain"], sign="+") for name in METRICS]
        rows.append([*row, "" if entry["seconds"] is None else f"{entry['seconds']:.0f}"])
    return markdown_table(header, rows)


def bars(runs: Sequence[Dict[str, Any]]) -> List[Tuple[str, List[float]]]:
    """(method, AP of its runs) for :func:`draw_bars`."""
    values: Dict[str, List[float]] = {}
    for run in runs:
        values.setdefault(run["method"], []).append(run["metrics"].get("AP", math.nan))
    return list(values.items())


def _number(value, sign: str = "") -> str:
    if value is None:
        return ""
    if not isinstance(value, tuple):
        return f"{value:{sign}.2f}"
    mean, sd = value
    return f"{mean:{sign}.2f}" if math.isnan(sd) else f"{mean:{sign}.2f} ± {sd:.2f}"


def write(
    args: argparse.Namespace, teacher: Optional[Dict[str, Any]], runs: List[Dict[str, Any]]
) -> None:
    """Write results.json and results.md."""
    content = {
        "dataset": args.title,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread(s) used",
        "opts": args.opts,
        "teacher": teacher,
        "runs": runs,
    }
    with atomic_write(os.path.join(args.output, "results.json")) as f:
        f.write(json.dumps(content, indent=1).encode())
    text = (
        f"{args.title}: COCO metrics in percent, mean ± standard deviation (n - 1); gains are "
        f"differences to the student alone with the same seed."
    )
    if teacher is not None:
        ap, iterations = _number(teacher["metrics"].get("AP")), teacher["iterations"]
        text += f" Teacher: AP {ap} after {iterations} iterations."
    with atomic_write(os.path.join(args.output, "results.md")) as f:
        f.write(f"{text}\n\n{markdown(runs)}\n".encode())


if __name__ == "__main__":
    main()
