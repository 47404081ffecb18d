#!/usr/bin/env python
"""Convert a foreign checkpoint to the names of this library and Detectron2.

The result is a .pth file for MODEL.WEIGHTS or KD.TEACHER.WEIGHTS. Every key of the source is
reported; a key that nothing is known about stops the conversion.
"""

import argparse
import os
import sys
from typing import Dict, List, Optional

import torch
from detectron2.modeling import build_model

from kd_d2.checkpoint import atomic_save, load_checkpoint_file
from kd_d2.engine.main import build_config
from kd_d2.modeling.convert import (
    VGG_VARIANTS,
    Conversion,
    compare_with_model,
    convert_detectron2,
    convert_mmdetection,
    convert_torchvision,
    fill_from_model,
    unwrap_state_dict,
)

_EXAMPLES = """
examples:
  ImageNet weights of torchvision as backbone of a detector (RGB, mean 123.675/116.28/103.53,
  std 58.395/57.12/57.375, and for ResNet MODEL.RESNETS.STRIDE_IN_1X1 False):

    python tools/convert_weights.py --source torchvision \\
        --input resnet18-f37072fd.pth --output resnet18_d2.pth

  VGG16 of torchvision (IMAGENET1K_FEATURES) for SSD (RGB, that mean, std 1):

    python tools/convert_weights.py --source torchvision \\
        --input vgg16_features-amdegroot-88682ab5.pth \\
        --output weights/torchvision_vgg16_features.pth --config-file configs/Base-SSD300.yaml

  A backbone that projects/DICOD/train_classifier.py trained, checked against the detector:

    python tools/convert_weights.py --source detectron2 \\
        --input output/imagenet/resnet50_quarter/model_final.pth \\
        --output weights/resnet50_quarter.pth \\
        --config-file projects/DICOD/configs/COCO/faster_rcnn_qr50_1x_all.yaml

  A detector of mmdetection, checked against the config that is going to use it:

    python tools/convert_weights.py --source mmdetection \\
        --input gfl_r50_fpn_1x_coco.pth --output gfl_r50.pth --config-file configs/Base-GFL.yaml
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        required=True,
        choices=("torchvision", "detectron2", "mmdetection"),
        help="torchvision: classifiers ResNet, MobileNetV2, Swin Transformer, VGG16; detectron2: a "
        "ResNet alone, with or without a classifier; mmdetection: detectors RetinaNet, FCOS, GFL, "
        "ATSS",
    )
    parser.add_argument("--input", required=True, help="checkpoint to convert")
    parser.add_argument("--output", required=True, help=".pth file to write")
    parser.add_argument(
        "--prefix",
        help="of the keys of a backbone (default: 'backbone.bottom_up.', of VGG16 "
        "'backbone.'; '' for a bare one)",
    )
    parser.add_argument(
        "--vgg-variant",
        default="auto",
        choices=VGG_VARIANTS,
        help="weights of a torchvision VGG16: 'features' are Caffe's (IMAGENET1K_FEATURES), 'v1' "
        "torchvision's own, whose classifier becomes conv6 and conv7 (default: v1 if there is a "
        "classifier of finite values)",
    )
    parser.add_argument(
        "--res5",
        default="",
        help="of the keys of a ResNet's last stage, if that is not in the backbone: "
        "'roi_heads.res5.' for detectors with a C4 head, with --prefix backbone.",
    )
    parser.add_argument(
        "--config-file",
        help="build the model of this config and check that it takes the result; also sets to 0 "
        "the conv biases that the source lacks",
    )
    parser.add_argument(
        "--allow-unused",
        action="store_true",
        help="write the result although keys of the source are unknown or do not fit the model",
    )
    parser.add_argument("--quiet", action="store_true", help="do not list keys that were used")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs that override the config"
    )
    return parser


def model_state(config_file: str, opts: List[str]) -> Dict[str, torch.Tensor]:
    """State dict of the freshly built model of a config, on the CPU.

    Raises:
        ValueError: unreadable config, or unknown keys.
    """
    cfg = build_config(config_file, opts).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg).state_dict()


def convert(args: argparse.Namespace) -> Conversion:
    """Convert, report on standard output, return the result.

    Raises:
        ValueError: unreadable file, unknown source, or keys that are unknown or do not fit and no
            ``--allow-unused``.
    """
    state_dict = unwrap_state_dict(load_checkpoint_file(args.input))
    sources = {
        "torchvision": lambda: convert_torchvision(
            state_dict, args.prefix, res5=args.res5, vgg_variant=args.vgg_variant
        ),
        "detectron2": lambda: convert_detectron2(state_dict, args.prefix, res5=args.res5),
        "mmdetection": lambda: convert_mmdetection(state_dict),
    }
    result = sources[args.source]()
    comparison = None
    if args.config_file:
        model = model_state(args.config_file, args.opts)
        result = fill_from_model(result, model)
        comparison = compare_with_model(result, model)

    lines = result.report() + (comparison.report() if comparison else [])
    for line in lines:
        if not (args.quiet and line.startswith(("used", "initial"))):
            print(line)
    print(
        f"{args.input}: {result.source}; {len(result.used)} keys used, {len(result.dropped)} "
        f"dropped, {len(result.filled)} filled, {len(result.unused)} unused"
    )
    problems = []
    if result.unused:
        problems.append(f"{len(result.unused)} keys of the source are unknown")
    if comparison and not comparison.fits:
        problems.append(
            f"the model of {args.config_file} does not fit: {len(comparison.missing)} keys "
            f"missing, {len(comparison.unexpected)} unexpected, {len(comparison.mismatched)} of "
            "another shape"
        )
    if problems and not args.allow_unused:
        raise ValueError("; ".join(problems) + " (see above; --allow-unused writes all the same)")
    return result


def main(argv: Optional[List[str]] = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        result = convert(args)
        checkpoint = {
            "model": result.state_dict,
            "__author__": f"converted from {result.source} by kd_d2",
            "matching_heuristics": False,
        }
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        atomic_save(checkpoint, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
