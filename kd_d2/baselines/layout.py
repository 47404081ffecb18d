"""Check for methods that compare class predictions cell by cell."""

from typing import Mapping

from kd_d2.distillation import KeyInfo, require_equal

__all__ = ["require_same_predictions"]


def require_same_predictions(
    method: str,
    student_keys: Mapping[str, KeyInfo],
    teacher_keys: Mapping[str, KeyInfo],
    key: str = "pred.cls",
) -> None:
    """Raise ``ValueError`` unless the channels of ``key`` mean the same in both networks.

    They do if classes and strides agree, and the anchors, too, where a cell has several: their
    order is that of the channels.
    """
    for side, keys in (("student", student_keys), ("teacher", teacher_keys)):
        if key not in keys:
            raise ValueError(
                f"{method} compares '{key}' of student and teacher, but the {side} has none: "
                "both must be dense detectors (GFL, RetinaNet, FCOS, ATSS), or both two-stage for "
                "'rpn.obj'"
            )
    require_equal(method, key, student_keys, teacher_keys)
    classes = student_keys[key].signature or (1,)
    if student_keys[key].channels != classes[0]:
        require_equal(method, "anchors", student_keys, teacher_keys)
