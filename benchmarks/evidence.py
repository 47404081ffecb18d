#!/usr/bin/env python
"""One table for all systems: students alone against distilled, same seeds, with paired differences.

    python benchmarks/evidence.py             # trains what is missing, hours on a CPU
    python benchmarks/evidence.py --stored    # from the results that are checked in, seconds

evidence.yaml beside this file lists the comparisons; each is made by compare.py, which keeps
finished runs and continues interrupted ones. The difference between a method and the student alone
is taken seed by seed; its confidence interval is Student's (95 %), which assumes that differences
are normally distributed. Published figures on COCO are listed apart.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import yaml
from compare import mean_sd, title

from kd_d2.checkpoint import atomic_write
from kd_d2.engine.catalogue import list_methods
from kd_d2.engine.main import import_components, short_errors
from kd_d2.visualization import markdown_table

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("evidence.yaml")
CONFIDENCE = 0.95
NEEDED = {"system", "pair", "data", "configs", "alone", "methods"}
ALLOWED = NEEDED | {"options", "stored", "before"}


def main() -> None:
    args = parse_args()
    with short_errors():
        published, comparisons = read_list(Path(args.list))
        results = []
        for number, entry in enumerate(comparisons, start=1):
            name = f"{entry['system']}, {entry['pair']}, {entry['data']}"
            print(f"[{number}/{len(comparisons)}] {name}", flush=True)
            if args.stored:
                results.append(stored(entry))
            else:
                results.append(measured(entry, args))
    rows = [row for entry, result in zip(comparisons, results) for row in compared(entry, result)]
    text = page(rows, published, "--stored" if args.stored else "")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    draw(rows, str(output / "evidence.png"))
    figures = json.dumps(without_nan(rows), indent=1)
    for file, content in (("evidence.json", figures), ("evidence.md", text)):
        with atomic_write(str(output / file)) as f:
            f.write(f"{content}\n".encode())
    print(f"\n{text}\nevidence: written to {output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stored", action="store_true", help="read checked-in results only")
    parser.add_argument("--list", default=str(LIST), metavar="YAML", help="default: evidence.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of compare.py")
    parser.add_argument("--output", default="output/evidence", metavar="DIR")
    return parser.parse_args()


def read_list(path: Path) -> Tuple[List[str], List[Dict[str, Any]]]:
    """Names of methods with published figures, and the comparisons of the YAML at ``path``.

    Raises:
        ValueError: a comparison lacks something, or has an unknown key.
    """
    with open(path) as f:
        content = yaml.safe_load(f)
    for number, entry in enumerate(content["comparisons"], start=1):
        keys = set(entry)
        if NEEDED - keys or keys - ALLOWED:
            raise ValueError(
                f"{path}: comparison {number} lacks {sorted(NEEDED - keys) or 'nothing'} and has "
                f"unknown keys {sorted(keys - ALLOWED) or 'none'}"
            )
    return content.get("published", []), content["comparisons"]


def stored(entry: Dict[str, Any]) -> Dict[str, Any]:
    """The checked-in result of a comparison.

    Raises:
        ValueError: the entry names no file.
        KeyError: the file has no such comparison.
    """
    if "stored" not in entry:
        raise ValueError(f"no stored results of {entry['configs']}; run without --stored")
    file, _, key = entry["stored"].partition("#")
    with open(ROOT / file) as f:
        content = json.load(f)
    return content[key] if key else content


def measured(entry: Dict[str, Any], args: argparse.Namespace) -> Dict[str, Any]:
    """The result of a comparison, after whatever of it is missing has been trained.

    Raises:
        subprocess.CalledProcessError: a command failed; it has said why.
    """
    for command in entry.get("before", []):
        if not Path(command["makes"]).is_file():
            _run(command["run"].split())
    folder = title(ROOT / entry["configs"])
    output = Path("output", "comparison", folder)
    _run(
        ["benchmarks/compare.py", "--configs", entry["configs"], "--output", str(output)]
        + ["--methods", entry["alone"], *entry["methods"]]
        + ["--seeds", *map(str, args.seeds), "--threads", str(args.threads)]
        + list(map(str, entry.get("options", [])))
    )
    with open(output / "results.json") as f:
        return json.load(f)


def _run(command: Sequence[str]) -> None:
    """Run a script of this repository, in this folder, with its output on the terminal."""
    print("$ python " + " ".join(command), flush=True)
    script, *rest = command
    subprocess.run([sys.executable, str(ROOT / script), *rest], check=True)


def interval(differences: Sequence[float]) -> Tuple[float, float]:
    """Confidence interval of the mean of paired differences; nan for fewer than two."""
    from scipy import stats

    n = len(differences)
    if n < 2:
        return math.nan, math.nan
    mean, sd = mean_sd(differences)
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * sd / math.sqrt(n)
    return mean - half, mean + half


def compared(entry: Dict[str, Any], result: Dict[str, Any]) -> List[Dict[str, Any]]:
    """One row for every method of a comparison that has runs with seeds of the student alone."""
    runs: Dict[str, Dict[int, Dict[str, Any]]] = {}
    for run in result["runs"]:
        runs.setdefault(run["method"], {})[run["seed"]] = run
    alone = runs.get(entry["alone"], {})
    rows = []
    for method, name in entry["methods"].items():
        taught = runs.get(method, {})
        seeds = sorted(set(alone) & set(taught))
        if not seeds:
            continue
        # a detector that found nothing has no AP: the row says nan
        aps = [[runs[s]["metrics"].get("AP", math.nan) for s in seeds] for runs in (alone, taught)]
        pairs = list(zip(*aps))
        differences = [after - before for before, after in pairs]
        rows.append(
            {
                **{key: entry[key] for key in ("system", "pair", "data")},
                "method": name,
                "seeds": seeds,
                "alone": mean_sd([before for before, _ in pairs]),
                "distilled": mean_sd([after for _, after in pairs]),
                "difference": mean_sd(differences)[0],
                "interval": interval(differences),
                "better": sum(d > 0 for d in differences),
                "iterations": taught[seeds[0]]["iterations"],
                "seconds": _seconds(taught),
                "hardware": result["hardware"],
                "torch": taught[seeds[0]]["versions"]["torch"],
                "configs": entry["configs"],
            }
        )
    return rows


def without_nan(value: Any) -> Any:
    """The same with None in place of nan, which JSON has not."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _seconds(runs: Dict[int, Dict[str, Any]]) -> Any:
    """Mean of the runs that were timed and not interrupted; None without any."""
    times = [r["seconds"] for r in runs.values() if "seconds" in r and not r["resumed"]]
    return sum(times) / len(times) if times else None


def page(rows: List[Dict[str, Any]], published: Sequence[str], options: str) -> str:
    """The table with its command and settings, and the published figures apart."""
    hardware = sorted({f"{row['hardware']}, torch {row['torch']}" for row in rows})
    command = " ".join(part for part in ("python benchmarks/evidence.py", options) if part)
    header = ["system", "student, teacher", "data", "method", "alone", "distilled", "difference"]
    header += ["95 % interval", "better", "iterations", "s a run"]
    body = []
    for row in rows:
        low, high = row["interval"]
        timed = row["seconds"] is not None
        body.append(
            [*(row[key] for key in ("system", "pair", "data", "method"))]
            + [_spread(row["alone"]), _spread(row["distilled"]), f"{row['difference']:+.2f}"]
            + ["" if math.isnan(low) else f"{low:+.1f} to {high:+.1f}"]
            + [f"{row['better']} of {len(row['seeds'])}", str(row["iterations"])]
            + [f"{row['seconds']:.0f}" if timed else ""]
        )
    return "\n".join(
        [
            "# Evidence: students alone against distilled\n",
            f"```sh\n{command}\n```\n",
            "COCO AP in percent, mean ± standard deviation (n − 1) over the seeds; differences are "
            "taken seed by seed, and the interval is that of their mean (Student's t, which three "
            'seeds make wide). "better" counts the seeds with a gain. These are short runs of '
            "small networks on small data, made for a CPU: what a method gains after a full "
            "schedule they cannot say. Settings, and what is known of why a method does not gain, "
            "are on the pages of the single comparisons.\n",
            f"Hardware: {'; '.join(hardware)}.\n",
            "![differences with confidence intervals](evidence.png)\n",
            markdown_table(header, body),
            "\n## Published\n",
            "What the papers report on COCO, with full schedules and large networks; none of it "
            "was measured by us.\n",
            *published_figures(published),
        ]
    )


def _spread(value: Tuple[float, float]) -> str:
    mean, sd = value
    return f"{mean:.2f}" if math.isnan(sd) else f"{mean:.2f} ± {sd:.2f}"


def published_figures(names: Sequence[str]) -> List[str]:
    """A line for every method with the gains that it declares as published.

    Raises:
        ValueError: there is no such method.
    """
    import_components()
    methods = {method.name: method for method in list_methods()}
    for name in names:
        if name not in methods:
            raise ValueError(f"{LIST.name}: published has '{name}', which is no method")
    infos = [(name, methods[name].info) for name in names]
    return [f"* {name}: {'; '.join(info.gains)}" for name, info in infos if info and info.gains]


def draw(rows: List[Dict[str, Any]], path: str) -> None:
    """Draw the differences with their intervals, one line a row of the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.26 * len(rows)))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    for y, row in enumerate(rows):
        color = f"C{systems.index(row['system']) % 10}"
        low, high = row["interval"]
        if not math.isnan(low):
            axis.plot([low, high], [y, y], color=color, alpha=0.6, linewidth=3)
        axis.plot([row["difference"]], [y], "o", color=color, markersize=5)
    labels = [f"{row['pair']}, {row['data']}: {row['method']}" for row in rows]
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel("AP distilled minus AP alone, same seed; 95 % interval")
    axis.grid(axis="x", alpha=0.3)
    handles = [plt.Line2D([], [], marker="o", color=f"C{i % 10}") for i in range(len(systems))]
    axis.legend(handles, systems, fontsize=7, loc="best")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
