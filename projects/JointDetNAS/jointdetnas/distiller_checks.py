"""What cannot be distilled is said when the distiller is built: keys, both values, the mend."""

from typing import Dict, Mapping

from kd_d2.distillation import KeyInfo

__all__ = ["check_pair", "check_weights"]

Keys = Mapping[str, KeyInfo]


def check_weights(node) -> Dict[str, float]:
    """Return the weights of the terms of ``KD.JOINTDETNAS`` that are on.

    Raises:
        ValueError: a negative weight, NaN, or all of them 0.
    """
    weights = {name: node[name.upper()].WEIGHT for name in ("feat", "cls", "reg")}
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(
                f"KD.JOINTDETNAS.{name.upper()}.WEIGHT must be at least 0, got {weight}"
            )
    if not any(weights.values()):
        raise ValueError(
            "KD.JOINTDETNAS.FEAT.WEIGHT, CLS.WEIGHT and REG.WEIGHT are all 0: give one a weight, "
            "or set KD.ENABLED to False"
        )
    return {name: weight for name, weight in weights.items() if weight}


def check_pair(cfg, weights: Mapping[str, float], student_keys: Keys, teacher_keys: Keys) -> None:
    """Raise ``ValueError`` if the two detectors cannot be compared by the terms in ``weights``.

    Args:
        cfg: the student's config.
    """
    sides = {"student": student_keys, "teacher": teacher_keys}
    for side, keys in sides.items():
        if "roi.cls" not in keys or "roi.cls[1]" in keys:
            raise ValueError(
                f"JointDetNAS compares boxes of one RoI head, but the {side} is no two-stage "
                "detector or a cascade; use Faster R-CNN on both sides"
            )
    if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES is True for the student: its sampled boxes are "
            "then overwritten, and the teacher would see others than its head did; set it to False"
        )
    if "feat" in weights:
        _check_features(cfg, student_keys, teacher_keys)
    if "cls" in weights or "reg" in weights:
        _check_predictions(sides)
    if "reg" in weights:
        _check_boxes(sides)


def _check_features(cfg, student_keys: Keys, teacher_keys: Keys) -> None:
    ours, theirs = student_keys["roi.feat"], teacher_keys["roi.feat"]
    if ours.signature[:2] != theirs.signature[:2]:
        raise ValueError(
            "KD.JOINTDETNAS.FEAT compares cells of RoIs, but MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION "
            f"is {ours.signature[0]} for the student and {theirs.signature[0]} for the teacher; "
            "give both the same, or set FEAT.WEIGHT to 0.0"
        )
    width = cfg.KD.JOINTDETNAS.FEAT.ADAPTER_CHANNELS
    if width < 0 or 0 < width < theirs.channels:
        raise ValueError(
            f"KD.JOINTDETNAS.FEAT.ADAPTER_CHANNELS is {width}, but the teacher's pyramid has "
            f"{theirs.channels} channels; make it that or more, or 0 for the teacher's width"
        )


def _check_predictions(sides: Mapping[str, Keys]) -> None:
    counts = {side: keys["roi.cls"].channels - 1 for side, keys in sides.items()}
    if counts["student"] != counts["teacher"]:
        raise ValueError(
            "KD.JOINTDETNAS.CLS and REG compare predictions of classes, but "
            f"MODEL.ROI_HEADS.NUM_CLASSES is {counts['student']} for the student and "
            f"{counts['teacher']} for the teacher; train both on the same classes, or set their "
            "weights to 0.0"
        )
    for side, keys in sides.items():
        if "use_sigmoid_ce" in keys["roi.cls"].signature:
            raise ValueError(
                "KD.JOINTDETNAS.CLS and REG read a softmax over classes and background, but "
                f"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is True for the {side}; use a model trained "
                "with False, or set their weights to 0.0"
            )


def _check_boxes(sides: Mapping[str, Keys]) -> None:
    for side, keys in sides.items():
        classes = keys["roi.cls"].channels - 1
        if keys["roi.box"].channels != 4 * classes:
            raise ValueError(
                "KD.JOINTDETNAS.REG compares deltas of every class, but "
                f"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is True for the {side}; set it to "
                "False, or REG.WEIGHT to 0.0"
            )
