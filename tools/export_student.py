#!/usr/bin/env python
"""Write the trained student alone: for a plain Detectron2, for ONNX runtimes, for TorchScript.

    python tools/export_student.py --weights output/run --output exported
    python tools/export_student.py --config-file configs/x.yaml --weights model_final.pth \
        --output exported MODEL.DEVICE cpu
    python tools/export_student.py --weights output/run --formats onnx torchscript \
        --images photo1.jpg photo2.jpg --output exported

``exported/model_student.pth`` and ``exported/config.yaml`` are always written. They are read back
and compared with the checkpoint before the tool reports success. Students whose components are all
Detectron2's own (RetinaNet, R-CNN) need no kd_d2 afterwards; for others the tool says what to
import.

``model_student.onnx`` and ``model_student.ts`` need neither. They are functions of pixels in
INPUT.FORMAT, (N, 3, H, W), from 0 to 255, already resized (metadata of the file: min_size_test,
max_size_test), images of a batch of one size. N, H and W are free; normalisation, padding, decoding
and non-maximum suppression are inside. Results are padded to D = TEST.DETECTIONS_PER_IMAGE:

    num_detections  int64 (N)          rows beyond it are padding
    boxes           float (N, D, 4)    x1, y1, x2, y2 in pixels of the input, best first
    scores          float (N, D)
    classes         int64 (N, D)       0..K-1, names in the metadata

Both are run on --images, one by one and as a batch of another size, and compared with the detector
in PyTorch; a file that detects anything else is not written. Detectors: RetinaNet, FCOS, GFL, ATSS,
Faster R-CNN (FPN, C4 and Cascade, boxes only) and MimicDet. ONNX files take pixels of --input-type,
TorchScript files of any type (loading them needs `import torchvision`).
"""

import argparse
import logging
import os
import sys
from typing import List, Optional, Sequence

from detectron2.data import MetadataCatalog
from torch import Tensor

from kd_d2.checkpoint import MissingFileError
from kd_d2.export import (
    CONFIG_NAME,
    GRAPH_FORMATS,
    INPUT_TYPES,
    Export,
    Tolerance,
    build_student,
    check_request,
    export_student,
    find_checkpoint,
    read_images,
    write_graphs,
)

FORMATS = ("pth", "safetensors", *GRAPH_FORMATS)


def parse_arguments(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--weights",
        required=True,
        metavar="FILE_OR_FOLDER",
        help="checkpoint of the run, or its output folder (the last checkpoint is taken)",
    )
    parser.add_argument(
        "--config-file",
        default="",
        metavar="YAML",
        help=f"config of the run (default: {CONFIG_NAME} beside the checkpoint)",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=["pth"],
        help="what to write besides model_student.pth and the config",
    )
    parser.add_argument(
        "--safetensors", action="store_true", help="the same as safetensors among --formats"
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="images to compare ONNX and TorchScript files with the detector on",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="write these files without a comparison"
    )
    parser.add_argument(
        "--box-tolerance",
        type=float,
        default=Tolerance().box,
        metavar="PX",
        help="largest difference of a coordinate (default: %(default)s)",
    )
    parser.add_argument(
        "--score-tolerance",
        type=float,
        default=Tolerance().score,
        metavar="S",
        help="largest difference of a score (default: %(default)s)",
    )
    parser.add_argument(
        "--input-type",
        choices=list(INPUT_TYPES),
        default="uint8",
        help="type of the pixels that an ONNX file takes (default: %(default)s)",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides of config keys, separated by spaces, after all options and, if the last "
        "option takes several values, after --",
    )
    args = parser.parse_args(arguments)
    # Python versions differ in whether they leave it there.
    args.opts = args.opts[1:] if args.opts[:1] == ["--"] else args.opts
    return args


def describe(export: Export) -> str:
    """What was written and how to use it."""
    lines = [f"wrote {path} ({os.path.getsize(path) / 1e6:.2f} MB)" for path in export.files]
    lines.append(f"parameters: {export.num_parameters / 1e6:.2f} M")
    if export.dropped:
        lines.append(f"left out: {export.dropped} tensors that only training needs")
    if export.num_detections:
        lines.append(f"checked: weights, and {export.num_detections} detections in a random image")
    else:
        lines.append("checked: weights; nothing was detected in the random image to compare")
    if export.packages:
        lines.append("needs kd_d2: build the config in this way, then cfg.merge_from_file")
        lines += [f"  import {package}" for package in export.packages]
        lines += ["  from kd_d2.config import get_cfg", "  cfg = get_cfg()"]
    else:
        lines.append("needs Detectron2 only, kd_d2 is not imported")
    return "\n".join(lines)


def export_graphs(
    args: argparse.Namespace, export: Export, formats: List[str], images: List[Tensor]
) -> List[str]:
    """Write the graphs of the exported student; a line for each."""
    cfg, model = build_student(args.output, export.packages)
    files = write_graphs(
        cfg,
        model,
        args.output,
        formats,
        images,
        check=not args.no_check,
        tolerance=Tolerance(args.box_tolerance, args.score_tolerance),
        classes=export.classes or class_names(cfg),
        input_type=args.input_type,
    )
    return [
        f"wrote {x.path} ({os.path.getsize(x.path) / 1e6:.2f} MB), "
        + (f"checked: {x.comparison.describe()}" if x.comparison else "not checked")
        for x in files
    ]


def class_names(cfg) -> List[str]:
    """Those of the data sets of the config, empty if they are unknown."""
    from kd_d2.data import register_all

    register_all()
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        classes = MetadataCatalog.get(name).get("thing_classes", None)
        if classes:
            return list(classes)
    return []


def main(arguments: Optional[Sequence[str]] = None) -> Export:
    """Export as the command line says.

    Raises:
        ValueError, ImportError: see :func:`kd_d2.export.export_student` and
            :func:`kd_d2.export.write_graphs`.
    """
    # Imported here: --help is quick, and the projects register their components.
    from kd_d2.engine.main import build_config

    args = parse_arguments(arguments)
    weights = find_checkpoint(args.weights)
    config_file = args.config_file or os.path.join(os.path.dirname(weights), CONFIG_NAME)
    if not os.path.isfile(config_file):
        raise MissingFileError(
            f"There is no {config_file}: give the config of the run as --config-file."
        )
    cfg = build_config(config_file, args.opts)
    graphs = [name for name in GRAPH_FORMATS if name in args.formats]
    check_request(graphs, args.images, not args.no_check)
    images = read_images(cfg, args.images)
    export = export_student(
        cfg,
        weights,
        args.output,
        args.safetensors or "safetensors" in args.formats,
    )
    print(describe(export), flush=True)
    if graphs:
        print("\n".join(export_graphs(args, export, graphs, images)))
    return export


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("kd_d2.export").setLevel(logging.INFO)
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"export_student: error: {error}")
