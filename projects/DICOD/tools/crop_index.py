#!/usr/bin/env python
"""Index the boxes of detection data sets that become crops, and print what was kept and dropped.

The index is stored, for train_classifier.py, and built again only when the annotations have
changed. With --write-crops the crops are written as image files, too (CROP_CLASSIFIER.CROPS_DIR).
"""

import argparse

from kd_d2.data import check_datasets, register_all
from kd_d2.engine.main import build_config, short_errors
from kd_d2.projects.dicod.crop_files import write_crop_files
from kd_d2.projects.dicod.crop_index import load_crop_index


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", nargs="*", default=(), metavar="NAME", help="data sets")
    parser.add_argument(
        "--config-file",
        default="",
        metavar="YAML",
        help="without --dataset: those of its DATASETS.TRAIN and DATASETS.TEST",
    )
    parser.add_argument("--index-dir", default="", metavar="FOLDER", help="where indices are")
    parser.add_argument("--write-crops", default="", metavar="FOLDER", help="write image files")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    return parser


def main(argv=None) -> None:
    args = build_parser().parse_args(argv)
    with short_errors():
        cfg = build_config(args.config_file, args.opts).clone()
        if args.dataset:
            cfg.defrost()
            cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(args.dataset), ()
        register_all(cfg)
        check_datasets(cfg)
        names = dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
        if not names:
            raise ValueError("Name data sets with --dataset, or a config that has some.")
        folder = args.index_dir or cfg.CROP_CLASSIFIER.INDEX_DIR
        for name in names:
            index = load_crop_index(name, folder)
            print(index.report())
            if args.write_crops:
                print(f"  written to {write_crop_files(index, args.write_crops)}")


if __name__ == "__main__":
    main()
