#!/usr/bin/env python
"""Apply one student action to a checkpoint and write the new student, with its config.

--list prints the legal actions. One-shot pruning (Table 2 of the paper) is

    evolve.py --config-file base.yaml --weights base.pth --action ChannelPruning --output pruned
        SEARCH.CHANNEL_PRUNING.PERCENT 0.1

The written config trains and evaluates with train_net.py.
"""

import argparse
import os

from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from kd_d2.checkpoint import KDCheckpointer, atomic_write, load_weights
from kd_d2.data import build_train_loader, check_datasets, register_all
from kd_d2.engine.main import build_config, short_errors
from kd_d2.projects.jointdetnas import Action, StudentMorphism
from kd_d2.projects.jointdetnas.cost import backbone_cost, total
from kd_d2.projects.jointdetnas.evolve import calibration_images
from kd_d2.projects.jointdetnas.morph_resnet import config_architecture
from kd_d2.projects.jointdetnas.presets import config_text, resolve
from kd_d2.projects.jointdetnas.surgery import bottom_up_of


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="YAML", help="of the student")
    parser.add_argument("--weights", required=True, metavar="FILE", help="its checkpoint")
    parser.add_argument("--list", action="store_true", help="print the legal actions and stop")
    parser.add_argument("--action", default="", metavar="NAME", help="kind of action")
    parser.add_argument("--stage", type=int, default=0, help="1 to 4, for AddLayer and Rearrange")
    parser.add_argument("--direction", choices=("left", "right"), default="", help="for Rearrange")
    parser.add_argument(
        "--root",
        default="",
        metavar="ENCODING",
        help="base detector that floors and depths refer to (default: the student itself)",
    )
    parser.add_argument("--output", default="", metavar="FOLDER", help="where to write to")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    with short_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: the action is not legal, or files do not fit together.
    """
    cfg = build_config(args.config_file, [*args.opts, "MODEL.WEIGHTS", args.weights]).clone()
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
    architecture = config_architecture(cfg)
    stem = architecture.stem
    morphism = StudentMorphism(cfg, resolve(args.root, stem) if args.root else architecture)
    model = build_model(cfg)
    load_weights(model, args.weights, cfg.KD.ALLOW_UNSAFE_LOAD)
    architecture = bottom_up_of(model).architecture  # with the ages of its blocks
    if args.list:
        for actions in morphism.legal(architecture).values():
            print("\n".join(map(str, actions)))
        return
    if not args.output or os.path.exists(os.path.join(args.output, "last_checkpoint")):
        raise ValueError(f"--output must be a folder without checkpoints, got '{args.output}'")
    action = Action(args.action, args.stage - 1, args.direction)
    images = []
    if morphism.needs_images(architecture, action):
        register_all(cfg)
        check_datasets(cfg)
        images = calibration_images(model, build_train_loader(cfg), cfg.SEARCH.CALIBRATION_BATCHES)
    child = morphism.evolve(model, action, images)
    write(child, cfg, args.output)
    size = tuple(cfg.SEARCH.SCORE.BASE_SIZE)
    changed = bottom_up_of(child).architecture
    before, after = (total(backbone_cost(a, size)) for a in (architecture, changed))
    print(f"{action}\n{architecture}\n{changed}")
    print(
        f"backbone: {before.parameters:,} -> {after.parameters:,} parameters, "
        f"{before.macs / 1e9:.2f} -> {after.macs / 1e9:.2f} GMAC at {size[0]}x{size[1]}"
    )


def write(model, cfg, folder: str) -> None:
    """The checkpoint and a config with its encoding."""
    os.makedirs(folder, exist_ok=True)
    KDCheckpointer(model, folder).save("model_init")
    # training from it is a run of its own, and resumes nothing
    os.remove(os.path.join(folder, "last_checkpoint"))
    cfg.defrost()
    cfg.MODEL.MORPH_RESNET.ENCODING = config_text(bottom_up_of(model).architecture)
    cfg.MODEL.WEIGHTS = os.path.join(folder, "model_init.pth")
    cfg.OUTPUT_DIR = os.path.join(folder, "run")
    with atomic_write(os.path.join(folder, "config.yaml")) as file:
        file.write(cfg.dump().encode())


if __name__ == "__main__":
    main()
