#!/usr/bin/env python
"""Detect objects in images, folders, videos or a camera: pictures and COCO JSON.

    python tools/predict.py photos clip.mp4 --weights output/run --output seen
    python tools/predict.py 0 --max-frames 200 --weights output/run --output camera
    python tools/predict.py photos --config-file student.yaml --weights student.pth \\
        --output seen --teacher --score-threshold 0.3 --opts KD.TEACHER.WEIGHTS teacher.pth

An input is an image, a video, a folder that is searched for both, or the number of a camera, which
runs until --max-frames or Ctrl-C. Into the output folder go

  pictures/                     a picture for each image and a video (MP4) for each video or camera
  coco_instances_results.json   all detections, whatever their score, as an evaluation writes them
  images.json                   ids, names and sizes of the images, and the categories
  teacher_results.json          with --teacher: the detections of the teacher

--score-threshold, --max-size and --min-size concern the pictures; how the network sees an image
stands in the config (INPUT.MIN_SIZE_TEST). With --teacher the teacher of the config, KD.TEACHER, is
drawn beside the student. Names of classes come from --classes, else from the checkpoint, else from
the config's data sets. Files that cannot be read are reported and left out; the exit status is 1
then.
"""

import argparse
import os
import sys
from typing import Dict, List, NamedTuple, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tqdm import tqdm

from kd_d2.checkpoint import load_weights
from kd_d2.data import register_all
from kd_d2.engine.analysis_command import teacher_of
from kd_d2.engine.main import build_config, short_errors
from kd_d2.export import CONFIG_NAME, find_checkpoint
from kd_d2.prediction import (
    CocoResults,
    Detector,
    Outputs,
    Source,
    Unreadable,
    class_names_of,
    find_sources,
    picture_names,
)
from kd_d2.visualization import draw_overlay, side_by_side

STUDENT, TEACHER = "student", "teacher"
FILES = {STUDENT: "coco_instances_results.json", TEACHER: "teacher_results.json"}


class Side(NamedTuple):
    """A network, and the names of its classes by index."""

    detector: Detector
    names: List[str]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="see above")
    parser.add_argument(
        "--weights",
        required=True,
        metavar="FILE_OR_FOLDER",
        help="checkpoint, or output folder of a run (its last checkpoint is taken)",
    )
    parser.add_argument(
        "--config-file",
        default="",
        metavar="YAML",
        help=f"config of the run (default: {CONFIG_NAME} beside the checkpoint)",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where to write")
    parser.add_argument("--teacher", action="store_true", help="draw the teacher, too")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        metavar="S",
        help="least score of what is drawn, 0 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--max-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="longer side of pictures of larger images (default: that of the image)",
    )
    parser.add_argument(
        "--min-size",
        type=int,
        default=0,
        metavar="PIXELS",
        help="longer side of pictures of smaller images, whose labels would hide everything",
    )
    parser.add_argument(
        "--max-frames",
        type=int,
        default=0,
        metavar="N",
        help="stop videos and cameras after N frames (default: at their end)",
    )
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="NAME", help="names of the classes in order"
    )
    parser.add_argument("--no-pictures", action="store_true", help="write the JSON files only")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="overrides of config keys, after all other options",
    )
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Raise ``ValueError`` for numbers that mean nothing."""
    if not 0 <= args.score_threshold <= 1:
        raise ValueError(f"--score-threshold must lie between 0 and 1, got {args.score_threshold}")
    if min(args.max_size, args.min_size, args.max_frames) < 0:
        raise ValueError("--max-size, --min-size and --max-frames must not be negative")
    if args.max_size and args.min_size > args.max_size:
        raise ValueError(f"--min-size {args.min_size} is more than --max-size {args.max_size}")


def read_config(args: argparse.Namespace, weights: str) -> CfgNode:
    """The config of the run.

    Raises:
        ValueError, FileNotFoundError: it is not there or not right.
    """
    path = args.config_file or os.path.join(os.path.dirname(weights), CONFIG_NAME)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {path}: give the config of the run as --config-file")
    # a network may be described in its checkpoint
    cfg = build_config(path, [*args.opts, "MODEL.WEIGHTS", weights])
    register_all(cfg)
    return cfg


def networks(args: argparse.Namespace, cfg: CfgNode) -> Dict[str, Side]:
    """The student, and the teacher if it is wanted.

    Raises:
        ValueError, FileNotFoundError: a checkpoint or the names of classes do not fit.
    """
    model = build_model(cfg)
    optional = tuple(getattr(model, "training_only_modules", ()))
    extra = load_weights(model, cfg.MODEL.WEIGHTS, cfg.KD.ALLOW_UNSAFE_LOAD, optional=optional)
    stored = (extra.get("run_info") or {}).get("classes")
    names = class_names_of(model, cfg, args.classes, stored)
    result = {STUDENT: Side(Detector(model, cfg), names)}
    if args.teacher:
        teacher = teacher_of(cfg)
        if getattr(teacher, "cfg", None) is None:
            raise ValueError(f"--teacher: a {type(teacher).__name__} is no detector")
        known = class_names_of(teacher.model, teacher.cfg, (), teacher.classes)
        result[TEACHER] = Side(Detector(teacher.model, teacher.cfg), known or names)
    return result


class Run:
    """Everything from the sources to the files.

    Attributes:
        failures: what could not be read.
        written: paths of pictures and videos.
    """

    def __init__(self, args: argparse.Namespace, cfg: CfgNode, sides: Dict[str, Side]):
        self._args, self._sides = args, sides
        self.results = CocoResults(sides[STUDENT].names, cfg)
        self.failures: List[str] = []
        self.written: List[str] = []

    def source(self, source: Source, path: str, bar: tqdm) -> None:
        """All frames of one source.

        Args:
            source: where they come from.
            path: of its picture or video.
            bar: counts the frames.
        """
        outputs = Outputs(path, source)
        try:
            with outputs:
                for frame in source:
                    found = {who: side.detector(frame) for who, side in self._sides.items()}
                    image_id = self.results.add_image(source, frame)
                    for who, detections in found.items():
                        self.results.add(who, image_id, detections)
                    if not self._args.no_pictures:
                        outputs.add(self._drawn(frame, found))
                    bar.update()
        except Unreadable as error:
            self.failures.append(str(error))
            bar.write(f"skipped: {error}", file=sys.stderr)
            bar.update()
        finally:
            self.written += outputs.written

    def _drawn(self, frame, found):
        titled = len(found) > 1
        pictures = [
            draw_overlay(
                frame.image,
                detections,
                self._sides[who].names,
                self._args.score_threshold,
                title=who if titled else "",
                max_size=self._args.max_size,
                min_size=self._args.min_size,
            )
            for who, detections in found.items()
        ]
        return side_by_side(pictures)


def total_of(sources: Sequence[Source]) -> Optional[int]:
    """Number of frames of all sources; None if one does not say."""
    counts = [source.count() for source in sources]
    return None if None in counts else sum(counts)


def predict(args: argparse.Namespace, open_capture=None) -> Run:
    """Detect and write.

    Args:
        args: of :func:`build_parser`.
        open_capture: opens videos and cameras in place of ``cv2.VideoCapture``.

    Raises:
        ValueError, OSError, ImportError: input is wrong, before anything is written.
    """
    check_options(args)
    sources = find_sources(args.inputs, args.output, args.max_frames, open_capture)
    pictures = os.path.join(args.output, "pictures")
    paths = picture_names(sources, pictures)
    cfg = read_config(args, find_checkpoint(args.weights))
    run = Run(args, cfg, networks(args, cfg))
    os.makedirs(args.output if args.no_pictures else pictures, exist_ok=True)
    source = sources[0]
    try:
        with tqdm(total=total_of(sources), unit="image", desc="predict") as bar:
            for source in sources:
                run.source(source, paths[source.title], bar)
    except KeyboardInterrupt:
        print("interrupted: what there is so far is written", file=sys.stderr)
        if source.path:  # this is how a camera ends
            run.failures.append(f"{source.title}: interrupted")
    names = {who: FILES[who] for who in run._sides}
    run.written += run.results.write(args.output, names)
    return run


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = build_parser().parse_args(arguments)
    try:
        with short_errors():
            run = predict(args)
    except ImportError as error:
        sys.exit(f"predict: error: {error}")
    print(f"{len(run.results.images)} images, {len(run.written)} files in {args.output}")
    if run.failures:
        count = len(run.failures)
        sys.exit(
            f"predict: error: {count} input{'s' if count > 1 else ''} could not be read to the "
            f"end, the first is {run.failures[0]}"
        )


if __name__ == "__main__":
    main()
