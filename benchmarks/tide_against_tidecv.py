#!/usr/bin/env python
"""Compare kd_d2's analysis of errors with tidecv's, on one set of predictions.

    pip install --no-deps tidecv pandas seaborn appdirs pytz tzdata
    python benchmarks/tide_against_tidecv.py --gt instances_val.json \\
        --predictions output/run/inference/coco_instances_results.json --output tidecv.json

Prints AP, what each type of error costs and how often it occurs, at every IoU of --thresholds, of
both, and their largest difference. tidecv's reader of COCO's format wants a segmentation in every
annotation; here its data are filled with boxes alone. tidecv 1.0.1 asks for opencv-python, in place
of which kd_d2's opencv-python-headless does, hence --no-deps.
"""

import argparse
import json
from typing import Any, Dict, List, Sequence

from kd_d2.checkpoint import atomic_write
from kd_d2.engine.main import short_errors
from kd_d2.evaluation.tide import COCO_THRESHOLDS, ERROR_TYPES, check_thresholds, tide_errors
from kd_d2.visualization import markdown_table

QUANTITIES = ("AP", *ERROR_TYPES)


def main() -> None:
    args = parse_args()
    with short_errors():
        thresholds = check_thresholds(args.thresholds, "--thresholds")
        with open(args.gt) as f:
            gt = json.load(f)
        with open(args.predictions) as f:
            predictions = json.load(f)
        ours = our_rows(gt, predictions, thresholds)
        theirs = tidecv_rows(gt, predictions, thresholds)
    print(markdown_table(*table(ours, theirs)))
    for kind in ("value", "number"):
        largest = max(
            abs(a[kind][name] - b[kind][name]) for a, b in zip(ours, theirs) for name in a[kind]
        )
        print(f"largest difference of a {kind}: {largest:.3g}")
    if args.output:
        report = {"tidecv": tidecv_version(), "tidecv_rows": theirs, "kd_d2_rows": ours}
        with atomic_write(args.output) as f:
            f.write(f"{json.dumps(report, indent=1)}\n".encode())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gt", required=True, metavar="JSON", help="ground truth, COCO's format")
    parser.add_argument("--predictions", required=True, metavar="JSON")
    parser.add_argument("--thresholds", nargs="+", type=float, default=COCO_THRESHOLDS)
    parser.add_argument("--output", metavar="JSON", help="both results")
    return parser.parse_args()


def our_rows(gt, predictions, thresholds: Sequence[float]) -> List[Dict[str, Any]]:
    """Per threshold {"threshold", "value": quantity -> percent, "number": type -> errors}."""
    result = tide_errors(gt, predictions, thresholds)
    return [
        {
            "threshold": threshold,
            "value": {
                "AP": result.ap[i],
                **{name: result.errors[name][i] for name in ERROR_TYPES},
            },
            "number": {name: result.counts[name][i] for name in ERROR_TYPES},
        }
        for i, threshold in enumerate(result.thresholds)
    ]


def tidecv_rows(gt, predictions, thresholds: Sequence[float]) -> List[Dict[str, Any]]:
    """The same of tidecv.

    Raises:
        ValueError: tidecv is not installed.
    """
    try:
        from tidecv import TIDE, Data
    except ImportError as error:
        raise ValueError(
            f"tidecv cannot be imported ({error}); pip install --no-deps tidecv pandas seaborn "
            "appdirs pytz tzdata"
        ) from error
    truth, found = Data("ground truth"), Data("predictions")
    for category in gt["categories"]:
        truth.add_class(category["id"], category["name"])
    for image in gt["images"]:
        truth.add_image(image["id"], image["file_name"])
    for x in gt["annotations"]:
        add = truth.add_ignore_region if x.get("iscrowd") else truth.add_ground_truth
        add(x["image_id"], x["category_id"], x["bbox"])
    for x in predictions:
        found.add_detection(x["image_id"], x["category_id"], x["score"], x["bbox"])
    rows = []
    for threshold in thresholds:
        run = TIDE().evaluate(truth, found, pos_threshold=threshold, mode=TIDE.BOX)
        costs = {error.short_name: cost for error, cost in run.fix_main_errors().items()}
        numbers = {error.short_name: n for error, n in run.count_errors().items()}
        rows.append(
            {
                "threshold": threshold,
                "value": {"AP": run.ap, **{name: costs[name] for name in ERROR_TYPES}},
                "number": {name: numbers[name] for name in ERROR_TYPES},
            }
        )
    return rows


def tidecv_version() -> str:
    from importlib.metadata import version

    return version("tidecv")


def table(ours, theirs):
    """Header and rows: kd_d2's value / tidecv's, number of errors in brackets."""
    rows = []
    for a, b in zip(ours, theirs):
        row = [f"{a['threshold']:.2f}", f"{a['value']['AP']:.2f} / {b['value']['AP']:.2f}"]
        for name in ERROR_TYPES:
            values = f"{a['value'][name]:.2f} / {b['value'][name]:.2f}"
            row.append(f"{values} ({a['number'][name]} / {b['number'][name]})")
        rows.append(row)
    return ["IoU", *QUANTITIES], rows


if __name__ == "__main__":
    main()
