#!/usr/bin/env python
"""Make a teacher of a classifier of crops that another program has trained.

Takes a state dict with torchvision's names, also in the layout of PyTorch's ImageNet example
("state_dict", prefix "module."), and writes it with what distillation has to know about it.

  python projects/DICOD/tools/convert_classifier.py --input model_best.pth.tar \\
      --output classifier.pth --arch resnet50 --dataset coco_2017_train --input-size 112 \\
      --format RGB --pixel-mean 123.675 116.28 103.53 --pixel-std 1 1 1
"""

import argparse

import torch

from kd_d2.checkpoint import atomic_save, compare, load_checkpoint_file
from kd_d2.data import dataset_classes, register_all
from kd_d2.engine.main import import_components, short_errors
from kd_d2.modeling.convert import unwrap_state_dict
from kd_d2.projects.dicod.classifier import ARCHITECTURES, CropClassifier
from kd_d2.projects.dicod.image_classifier import ClassLosses


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="checkpoint to convert")
    parser.add_argument("--output", required=True, help="file to write, for KD.TEACHER.WEIGHTS")
    parser.add_argument("--arch", required=True, choices=sorted(ARCHITECTURES))
    parser.add_argument(
        "--dataset", required=True, help="data set whose classes, in order, are the logits"
    )
    parser.add_argument("--input-size", required=True, type=int, help="side of the crops, pixels")
    parser.add_argument("--format", required=True, choices=("RGB", "BGR"), help="channels")
    for name in ("mean", "std"):
        parser.add_argument(
            f"--pixel-{name}",
            required=True,
            nargs=3,
            type=float,
            help="of pixels of 0..255, in the order of --format",
        )
    parser.add_argument(
        "--losses", nargs="+", default=["cross_entropy"], choices=("cross_entropy", "focal")
    )
    parser.add_argument(
        "--allow-unsafe-load", action="store_true", help="read the input with full pickle"
    )
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    with short_errors():
        import_components()
        register_all()
        model = CropClassifier(
            arch=args.arch,
            classes=dataset_classes(args.dataset),
            pixel_mean=args.pixel_mean,
            pixel_std=args.pixel_std,
            image_format=args.format,
            input_size=args.input_size,
            losses=ClassLosses(names=args.losses),
        )
        state = unwrap_state_dict(load_checkpoint_file(args.input, args.allow_unsafe_load))
        report = compare(state, model)
        if not report.ok:
            raise ValueError(
                f"{args.input} does not fit {args.arch} with the {model.num_classes} classes of "
                f"{args.dataset}:\n{report.format()}"
            )
        model.load_state_dict(state)
        # copies: parts of larger tensors would be written whole
        state = {key: value.clone() for key, value in model.state_dict().items()}
        atomic_save({"model": state, "run_info": model.metadata()}, args.output)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.output}: {args.arch}, {parameters / 1e6:.2f} M parameters")


if __name__ == "__main__":
    with torch.no_grad():
        main()
