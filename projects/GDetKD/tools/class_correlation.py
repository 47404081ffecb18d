#!/usr/bin/env python
r"""How far students' correlations between classes are from the teacher's (Fig. 6).

    python projects/GDetKD/tools/class_correlation.py --config-file CONFIG --output correlation \
        --model baseline=plain/model_final.pth --model CKD=ckd/model_final.pth \
        KD.TEACHER.WEIGHTS TEACHER.pth

Of every student: foreground RoIs that it samples, raw logits of student and teacher for these
boxes, D = |corr(teacher) - corr(student)| over the RoIs. The students have the detector of
--config-file; of cascades the first stage counts. Writes class_correlation.png, .json (mean of D
beside its diagonal) and .npz (both correlations of every student, and D).
"""

import functools
import os
from typing import Dict, Optional, Sequence

import numpy as np
from detectron2.modeling import build_model
from observation import gather, images_of, seed, write

from kd_d2.checkpoint import load_weights
from kd_d2.data import dataset_classes
from kd_d2.distillation import build_tap
from kd_d2.engine.analysis_command import add_titled, parse, parser, prepare, teacher_of
from kd_d2.engine.main import short_errors
from kd_d2.projects.gdetkd.analysis.class_correlation import (
    class_correlation,
    foreground_logits,
    mean_off_diagonal,
)
from kd_d2.projects.gdetkd.analysis.observer import RoIObserver
from kd_d2.projects.gdetkd.records import build_student_rois
from kd_d2.projects.gdetkd.validation import check_teacher, paired_stages
from kd_d2.visualization import draw_matrices


def parse_arguments(arguments: Optional[Sequence[str]] = None):
    result = parser(__doc__, num_images=5000)
    add_titled(result, "--model", "FILE", "checkpoint of the config's student")
    return parse(result, arguments)


def logits_of(cfg, teacher, dataset: str, args, title: str, path: str) -> Dict[str, np.ndarray]:
    """Logits of one student and the teacher for the student's RoIs."""
    student = build_model(cfg)
    load_weights(student, path, cfg.KD.ALLOW_UNSAFE_LOAD)
    rois = build_student_rois(cfg, build_tap(student).keys(student))
    rois.outputs = True
    check_teacher(teacher.keys)
    stage = paired_stages(rois.num_stages, teacher.keys, cfg.KD.GDETKD.TEACHER_STAGE)[0]
    look = functools.partial(foreground_logits, stage)
    observer = RoIObserver(student, teacher, rois, look, teacher_needs=[f"roi.cls[{stage}]"])
    seed(cfg)
    return gather(observer, images_of(cfg, dataset, args), title)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    args = parse_arguments(arguments)
    arrays: Dict[str, np.ndarray] = {}
    facts: Dict[str, dict] = {}
    panels = []
    with short_errors():
        cfg, dataset = prepare(args)
        teacher = teacher_of(cfg)
        for title, path in args.model:
            logits = logits_of(cfg, teacher, dataset, args, title, path)
            ours, theirs = (class_correlation(logits[side]) for side in ("student", "teacher"))
            difference = np.abs(theirs - ours)
            for name, value in (("student", ours), ("teacher", theirs), ("difference", difference)):
                arrays[f"{title}.{name}"] = value
            mean = mean_off_diagonal(difference)
            rois = len(logits["image"])
            facts[title] = {"weights": path, "rois": rois, "mean_off_diagonal": mean}
            panels.append((f"{title}: {mean:.4f}", difference))
    write(args.output, "class_correlation", {"dataset": dataset, "students": facts}, arrays)
    picture = os.path.join(args.output, "class_correlation.png")
    draw_matrices(panels, picture, dataset_classes(dataset), "|difference of correlations|")
    for title, found in facts.items():
        print(f"{title}: {found['mean_off_diagonal']:.4f} ({found['rois']} RoIs)")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
