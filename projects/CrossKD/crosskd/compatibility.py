"""Whether features of one head can go through the other, and predictions be compared."""

from typing import Any, Mapping, Sequence, Tuple

from kd_d2.distillation import Key, KeyInfo

__all__ = ["check_pair", "num_tower_stages"]

_MEND = "Give the student the teacher's value, or choose another teacher"


def num_tower_stages(keys: Mapping[str, KeyInfo], branch: str) -> int:
    """Return the number of tower stages of ``branch`` ("cls" or "box") that ``keys`` tell of."""
    stages = [Key.parse(key).index for key in keys if key.startswith(f"head.{branch}[")]
    return max((stage for stage in stages if stage), default=0)


def check_pair(
    student_keys: Mapping[str, KeyInfo],
    teacher_keys: Mapping[str, KeyInfo],
    features: Sequence[str],
) -> None:
    """Raise unless both heads are built alike; the official code has no adapters either.

    Args:
        student_keys, teacher_keys: what the taps know about both networks.
        features: keys of the features that change heads.

    Raises:
        ValueError: length of the towers, strides, channels of the features, number of classes,
            anchors, box coder (with its numbers, e.g. reg_max) or branch of the centerness
            differ. The message names the config key, both values and what to do.
    """
    sides = student_keys, teacher_keys

    def require(what: str, config_key: str, value, mend: str = _MEND, show=lambda *x: x) -> None:
        student, teacher = (value(keys) for keys in sides)
        if student != teacher:
            student, teacher = show(student, teacher)
            raise ValueError(
                f"CrossKD needs heads that are built alike, but {what} ({config_key}) is "
                f"{student} in the student and {teacher} in the teacher. {mend}"
            )

    for branch in ("cls", "box"):
        require(
            f"the number of tower stages of branch '{branch}'",
            "NUM_CONVS",
            lambda keys: num_tower_stages(keys, branch),
        )
    require("the strides of the levels", "IN_FEATURES", lambda keys: keys["pred.cls"].strides)
    for feature in features:
        require(
            f"the channels of '{feature}'",
            "CONV_DIM; at position 0 and in RetinaNet's head MODEL.FPN.OUT_CHANNELS",
            lambda keys: keys[feature].channels,
            _MEND + "; a method with adapters, e.g. FitNets, takes any channels",
        )
    require(
        "the number of classes",
        "NUM_CLASSES",
        lambda keys: keys["pred.cls"].signature[0],
        "Train both on the same classes",
    )
    require(
        "the anchors of a cell",
        "MODEL.ANCHOR_GENERATOR; of GFL and ATSS also ANCHOR_SCALE",
        lambda keys: keys["anchors"].signature,
        show=_first_difference,
    )
    require(
        "the box coder",
        "MODEL.META_ARCHITECTURE, REG_MAX, BBOX_REG_WEIGHTS or MODEL.FCOS.NORM_BY_STRIDE",
        lambda keys: keys["codec"].signature,
        show=_without_common_parts,
    )
    require(
        "the branch of the centerness",
        "MODEL.FCOS.CENTERNESS_ON",
        lambda keys: keys["pred.ctr"].signature[0] if "pred.ctr" in keys else "none",
    )
    for prediction in ("pred.cls", "pred.box"):
        require(
            f"the channels of '{prediction}'",
            "the head's predictors",
            lambda keys: keys[prediction].channels,
        )


def _first_difference(student: Any, teacher: Any) -> Tuple[Any, Any]:
    """The first parts of two nested tuples of equal length that differ, else the two as they are.

    Anchors of five levels fill a screen; the one that differs says enough.
    """
    nested = isinstance(student, tuple) and isinstance(teacher, tuple)
    if nested and len(student) == len(teacher) and any(isinstance(x, tuple) for x in student):
        for a, b in zip(student, teacher):
            if a != b:
                return _first_difference(a, b)
    return student, teacher


def _without_common_parts(student: Tuple, teacher: Tuple) -> Tuple[Tuple, Tuple]:
    """What only one of two box coders has: names of types, pairs of attribute and value."""
    return tuple(
        tuple(x for x in a if x not in b) for a, b in ((student, teacher), (teacher, student))
    )
