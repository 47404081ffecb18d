#!/usr/bin/env python
"""What kinds of errors cost detectors their AP, several runs beside each other (TIDE).

    python tools/tide.py --gt instances_val.json --output errors \\
        --run SSD300=plain/inference/coco_instances_results.json \\
        --run "+KDcls=kdcls/inference/coco_instances_results.json"

Reads ground truth and predictions in COCO's format; boxes suffice. Instead of --gt a registered
data set: --dataset coco_2017_val; --config-file and overrides of config keys for one that depends
on the config. Writes into the output folder tide.png (one panel for each type of error: AP points
that mending all of its errors would gain, against the IoU that makes a true positive), tide.csv
and tide.json, and prints the means over the IoUs.

Types: Cls: wrong class; Loc: bad box; Both: both; Dupe: second detection of an object that is found
already; Bkg: nothing there; Miss: object that nothing found. With TEST.TIDE.ENABLED True the
evaluation of a run reports the same numbers beside AP.
"""

import argparse
import csv
import functools
import json
import os
import sys
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from tabulate import tabulate
from tqdm import tqdm

from kd_d2.data import register_all
from kd_d2.engine.main import build_config, short_errors
from kd_d2.evaluation.tide import (
    COCO_THRESHOLDS,
    ERROR_TYPES,
    TideResult,
    check_thresholds,
    tide_errors,
)
from kd_d2.visualization import draw_panels

TITLES = {
    "Cls": "classification",
    "Loc": "localisation",
    "Both": "classification and localisation",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    truth = parser.add_mutually_exclusive_group(required=True)
    truth.add_argument("--gt", metavar="JSON", help="ground truth in COCO's format")
    truth.add_argument("--dataset", metavar="NAME", help="registered data set")
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        type=titled_file,
        metavar="TITLE=JSON",
        help="title and predictions (coco_instances_results.json); may be given several times",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        default=list(COCO_THRESHOLDS),
        metavar="IOU",
        help="foreground IoUs, ascending (default: 0.5 to 0.95 in steps of 0.05)",
    )
    parser.add_argument(
        "--config-file", default="", metavar="YAML", help="config that --dataset depends on"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="overrides of config keys, after all other options",
    )
    return parser


def titled_file(text: str) -> Tuple[str, str]:
    title, separator, path = text.partition("=")
    if not (title and separator and path):
        raise argparse.ArgumentTypeError(f"expected TITLE=JSON, got '{text}'")
    return title, path


def read_json(path: str, kind: type, what: str) -> Any:
    """A file's content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON or not of the kind.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"the file {path} ({what}) does not exist")
    try:
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
    except ValueError as error:
        raise ValueError(f"{path} ({what}) is not a complete JSON file: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} is not {what} in COCO's format: no {kind.__name__} at its top")
    return content


def registered_ground_truth(name: str, cfg, folder: str) -> str:
    """JSON file of a registered data set; generated or converted (into ``folder``) if need be.

    Raises:
        ValueError, FileNotFoundError: the name is unknown or its files are missing.
    """
    register_all(cfg)
    if name not in DatasetCatalog:
        raise ValueError(f"--dataset {name} is not registered; known: {sorted(DatasetCatalog)}")
    DatasetCatalog.get(name)  # generates it, or says what is missing
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file is None:
        json_file = os.path.join(folder, f"{name}_coco_format.json")
        convert_to_coco_json(name, json_file, allow_cached=False)
    return json_file


def analyse(args: argparse.Namespace) -> Dict[str, TideResult]:
    """Title -> result, in the order of the command line.

    Raises:
        ValueError, FileNotFoundError: arguments or files are wrong.
    """
    thresholds = check_thresholds(args.thresholds, "--thresholds")
    titles = [title for title, _ in args.run]
    if len(set(titles)) < len(titles):
        raise ValueError(f"every --run needs its own title, got {titles}")
    if args.gt and (args.config_file or args.opts):
        raise ValueError("--config-file and --opts belong to --dataset, not to --gt")
    predictions = {title: read_json(path, list, "predictions") for title, path in args.run}
    os.makedirs(args.output, exist_ok=True)
    path = args.gt or registered_ground_truth(
        args.dataset, build_config(args.config_file, args.opts), args.output
    )
    gt = read_json(path, dict, "ground truth")
    result = {}
    for title, found in predictions.items():
        bar = functools.partial(tqdm, desc=title, unit="image")
        try:
            result[title] = tide_errors(gt, found, thresholds, progress=bar)
        except ValueError as error:
            raise ValueError(f"--run {title} with {path}: {error}") from error
    return result


def write(results: Dict[str, TideResult], folder: str) -> None:
    """tide.csv, tide.json and tide.png."""
    rows = [{"run": run, **row} for run, result in results.items() for row in result.rows()]
    with open(os.path.join(folder, "tide.csv"), "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with open(os.path.join(folder, "tide.json"), "w", encoding="utf-8") as f:
        json.dump({run: result.as_dict() for run, result in results.items()}, f, indent=1)
    panels = [
        (title, {run: result.errors[name] for run, result in results.items()})
        for name, title in TITLES.items()
    ]
    thresholds = next(iter(results.values())).thresholds
    path = os.path.join(folder, "tide.png")
    draw_panels(panels, thresholds, path, "foreground IoU", "error [AP points]")


def table(results: Dict[str, TideResult]) -> str:
    """Means over the thresholds, as Markdown."""
    rows: List[list] = []
    for run, result in results.items():
        means = [np.mean(result.errors[name]) for name in ERROR_TYPES]
        rows.append([run, *(f"{value:.2f}" for value in (np.mean(result.ap), *means))])
    align = ("left", *["right"] * (1 + len(ERROR_TYPES)))
    header = ["run", "AP", *ERROR_TYPES]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True, colalign=align)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = build_parser().parse_args(arguments)
    with short_errors():
        results = analyse(args)
    write(results, args.output)
    print(table(results))
    print(f"written: {', '.join(f'tide.{end}' for end in ('png', 'csv', 'json'))} in {args.output}")


if __name__ == "__main__":
    sys.exit(main())
