#!/usr/bin/env python
"""Write the trained student alone: weights and config for a plain Detectron2.

    python tools/export_student.py --weights output/run --output exported
    python tools/export_student.py --config-file configs/x.yaml --weights model_final.pth \
        --output exported MODEL.DEVICE cpu

``exported/model_student.pth`` and ``exported/config.yaml`` are read back and compared with the
checkpoint before the tool reports success. Students whose components are all Detectron2's own
(RetinaNet, R-CNN) need no kd_d2 afterwards; for others the tool says what to import.
"""

import argparse
import os
import sys
from typing import Optional, Sequence

from kd_d2.checkpoint import MissingFileError
from kd_d2.export import CONFIG_NAME, Export, export_student, find_checkpoint


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
        "--safetensors", action="store_true", help="also write model_student.safetensors"
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides of config keys, separated by spaces, after all options",
    )
    return parser.parse_args(arguments)


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


def main(arguments: Optional[Sequence[str]] = None) -> Export:
    """Export as the command line says.

    Raises:
        ValueError, ImportError: see :func:`kd_d2.export.export_student`.
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
    export = export_student(
        build_config(config_file, args.opts), weights, args.output, args.safetensors
    )
    print(describe(export))
    return export


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"export_student: error: {error}")
