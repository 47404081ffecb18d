"""Whether features of one head can go through the other, and predictions be compared."""

from typing import Mapping, Sequence

from kd_d2.distillation import Key, KeyInfo, require_equal

__all__ = ["check_pair", "num_tower_stages"]


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
        ValueError: length of the towers, channels of the features, strides, anchors, number of
            classes, box coder (with its numbers, e.g. reg_max) or branch of the centerness
            differ; the message has both values.
    """
    sides = student_keys, teacher_keys
    for branch in ("cls", "box"):
        student, teacher = (num_tower_stages(keys, branch) for keys in sides)
        if student != teacher:
            raise ValueError(
                f"CrossKD needs towers of equal length; branch '{branch}' has {student} stages in "
                f"the student and {teacher} in the teacher (NUM_CONVS)"
            )
    for key in [*features, "anchors", "codec", "pred.cls", "pred.box"]:
        require_equal("CrossKD", key, *sides)
    student, teacher = (k["pred.ctr"].signature if "pred.ctr" in k else None for k in sides)
    if student != teacher:
        raise ValueError(
            "CrossKD needs the centerness on the same branch of both heads (e.g. "
            f"MODEL.FCOS.CENTERNESS_ON); student {student}, teacher {teacher}"
        )
