#!/usr/bin/env python
r"""Which pyramid levels of student and teacher SGFI matches (Fig. 5).

    python projects/GDetKD/tools/level_matching.py --config-file CONFIG --output levels \
        --weights RUN/model_final.pth KD.TEACHER.WEIGHTS TEACHER.pth

Every foreground RoI that the student samples: index of the level with the largest weight minus
index of the teacher's level, each in its own pyramid, and the difference of the physical levels.
The checkpoint is one of the run with KD.GDETKD.FEAT.MODE "sgfi": it also holds the distiller.
Writes level_matching.png, .json (histograms, mean weights) and .npz (all RoIs).
"""

import functools
import os
from typing import Optional, Sequence

from detectron2.modeling import build_model
from observation import gather, images_of, seed, write

from kd_d2.checkpoint import load_weights
from kd_d2.distillation import build_distillers, build_tap
from kd_d2.engine.analysis_command import parse, parser, prepare, teacher_of
from kd_d2.engine.main import short_errors
from kd_d2.projects.gdetkd.analysis.level_matching import LevelMatches, level_weights
from kd_d2.projects.gdetkd.analysis.observer import RoIObserver
from kd_d2.projects.gdetkd.distiller import GDetKD
from kd_d2.projects.gdetkd.feature_terms import SGFITerm
from kd_d2.visualization import draw_bars


def parse_arguments(arguments: Optional[Sequence[str]] = None):
    result = parser(__doc__, num_images=500)
    result.add_argument(
        "--weights", required=True, metavar="FILE", help="checkpoint of the distilled run"
    )
    return parse(result, arguments)


def trained(cfg, path: str, teacher):
    """Student and distiller of a run's checkpoint.

    Raises:
        ValueError: the config has no GDetKD with SGFI over several levels, or the checkpoint has no
            distillers, or others.
    """
    student = build_model(cfg)
    distillers, _ = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    found = [d for d in distillers.values() if isinstance(d, GDetKD)]
    term = found[0].feature if found else None
    if type(term) is not SGFITerm or term.sgfi.num_levels == 1:
        raise ValueError(
            "--config-file must list GDetKD in KD.DISTILLERS, with KD.GDETKD.FEAT.MODE 'sgfi' and "
            "a student of several pyramid levels: nothing else has weights of levels"
        )
    extra = load_weights(student, path, cfg.KD.ALLOW_UNSAFE_LOAD)
    if "distillers" not in extra:
        raise ValueError(
            f"{path} has no entry 'distillers': give a checkpoint that the distilled run itself "
            "wrote, not an exported model"
        )
    try:
        distillers.load_state_dict(extra["distillers"])
    except RuntimeError as error:
        raise ValueError(f"{path} was written by a run with other distillers: {error}") from None
    return student, found[0].eval()


def draw(summary: dict, path: str) -> None:
    titles = {
        "index_difference": "student's level index minus teacher's",
        "level_difference": "the same, physical levels",
    }
    panels = [
        (title, [(str(k), [v]) for k, v in summary[name].items()]) for name, title in titles.items()
    ]
    means = [(name, [value]) for name, value in summary["mean_alpha"].items()]
    draw_bars([*panels, ("mean weight of the student's levels", means)], path, "fraction")


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse_arguments(arguments)
    with short_errors():
        cfg, dataset = prepare(args)
        seed(cfg)
        teacher = teacher_of(cfg)
        student, distiller = trained(cfg, args.weights, teacher)
        term, strides = distiller.feature, teacher.keys["neck"].strides
        observer = RoIObserver(
            student,
            teacher,
            distiller.rois,
            functools.partial(level_weights, term, strides),
            term.student_needs,
            term.teacher_needs,
        )
        arrays = gather(observer, images_of(cfg, dataset, args), "images")
    matches = LevelMatches(arrays["alpha"], arrays["teacher_level"], term.strides, strides)
    summary = matches.summary()
    facts = {"config": args.config_file, "weights": args.weights, "dataset": dataset}
    facts.update(student_strides=list(term.strides), teacher_strides=list(strides), **summary)
    write(args.output, "level_matching", facts, arrays)
    draw(summary, os.path.join(args.output, "level_matching.png"))
    print(
        f"{summary['rois']} RoIs, most frequent difference {summary['index_difference_mode']} "
        f"(physical levels: {summary['level_difference_mode']}); written to {args.output}"
    )


if __name__ == "__main__":
    main()
