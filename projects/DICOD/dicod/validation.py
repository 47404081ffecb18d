"""What cannot work is said when the distiller is built: keys, values of both sides, the mend."""

from typing import Dict, Mapping, Tuple

from kd_d2.config import choice
from kd_d2.distillation import KeyInfo

from .classifier import STAGES
from .kd_cls import CLS_MODES, ClsMode

__all__ = [
    "check_at_least_1",
    "check_numbers",
    "check_teacher",
    "check_train_on_pred_boxes",
    "check_weight",
    "cls_mode",
    "feature_pools",
    "pixel_pool",
    "terms_of",
]

Keys = Mapping[str, KeyInfo]

_OF_SCORES = {"softmax": "SoftmaxKL", "sigmoid": "BinaryKL"}


def terms_of(node) -> Dict[str, Tuple[str, float]]:
    """Return the terms that ``KD.DICOD`` switches on: name -> (key of its weight, weight)."""
    known = {
        "cls": (node.CLS.ENABLED, "CLS.WEIGHT", node.CLS.WEIGHT),
        "loc_obj": (node.LOC.ENABLED, "LOC.OBJ_WEIGHT", node.LOC.OBJ_WEIGHT),
        "loc_feat": (node.LOC.ENABLED, "LOC.FEAT_WEIGHT", node.LOC.FEAT_WEIGHT),
    }
    return {name: (key, w) for name, (enabled, key, w) in known.items() if enabled and w != 0}


# ------------------------------------------------------------------------------ single values
def check_weight(key: str, value: float) -> None:
    """Raise ``ValueError`` for a negative weight, or NaN."""
    if not value >= 0:
        raise ValueError(f"KD.DICOD.{key} must be at least 0, got {value}")


def check_at_least_1(key: str, value: int) -> None:
    """Raise ``ValueError`` for a number of crops, cells or pixels below 1."""
    if value < 1:
        raise ValueError(f"KD.DICOD.{key} must be at least 1, got {value}")


def cls_mode(node, scores: str) -> ClsMode:
    """Return the loss of ``KD.DICOD.CLS`` for a student with such scores.

    Raises:
        ValueError: an unknown mode, or one for other scores, or T that is no temperature.
    """
    known = [name for name, _ in CLS_MODES]
    name = choice("KD.DICOD.CLS.MODE", node.MODE, ["auto", *known])
    name = _OF_SCORES[scores] if name == "auto" else name
    mode = CLS_MODES.get(name)(node.T)
    if mode.scores != scores:
        fitting = [other for other in known if CLS_MODES.get(other).scores == scores]
        raise ValueError(
            f"KD.DICOD.CLS.MODE '{name}' is for students with a {mode.scores}, but this one's "
            f"class scores are those of a {scores}; use 'auto' or {' or '.join(fitting)}"
        )
    return mode


def pixel_pool(node) -> int:
    """Return ``OBJ_POOL`` of ``KD.DICOD.LOC``.

    Raises:
        ValueError: it is larger than the crops, or below 1.
    """
    check_at_least_1("LOC.OBJ_POOL", node.OBJ_POOL)
    if node.OBJ_POOL > node.SAMPLE_SIZE:
        raise ValueError(
            f"KD.DICOD.LOC.OBJ_POOL is {node.OBJ_POOL}, more cells than the crops have pixels, "
            f"KD.DICOD.LOC.SAMPLE_SIZE {node.SAMPLE_SIZE}; make it at most that"
        )
    return node.OBJ_POOL


def feature_pools(node, teacher_keys: Keys) -> Dict[str, int]:
    """Return layer -> cells a side, from ``FEAT_LAYERS`` and ``FEAT_POOLS`` of ``KD.DICOD.LOC``.

    Raises:
        ValueError: none, an unknown or a repeated layer, another number of pools, or a pool with
            more cells than the layer's map of a crop has.
    """
    layers, pools = list(node.FEAT_LAYERS), list(node.FEAT_POOLS)
    if not layers:
        raise ValueError(
            f"KD.DICOD.LOC.FEAT_LAYERS is empty; name some of {list(STAGES)}, or set "
            "KD.DICOD.LOC.FEAT_WEIGHT to 0.0"
        )
    for layer in layers:
        choice("KD.DICOD.LOC.FEAT_LAYERS", layer, STAGES)
    if len(set(layers)) < len(layers):
        raise ValueError(f"KD.DICOD.LOC.FEAT_LAYERS names a layer twice: {layers}")
    if len(pools) != len(layers):
        raise ValueError(
            f"KD.DICOD.LOC.FEAT_POOLS {pools} must have one entry for each of FEAT_LAYERS {layers}"
        )
    for layer, pool in zip(layers, pools):
        check_at_least_1("LOC.FEAT_POOLS", pool)
        (stride,) = teacher_keys[f"crops.{layer}"].strides
        side = -(-node.SAMPLE_SIZE // stride)
        if pool > side:
            raise ValueError(
                f"KD.DICOD.LOC.FEAT_POOLS asks for {pool}x{pool} cells of '{layer}', whose map of "
                f"a crop of KD.DICOD.LOC.SAMPLE_SIZE {node.SAMPLE_SIZE} pixels has {side}x{side}; "
                f"use at most {side}"
            )
    return dict(zip(layers, pools))


# ------------------------------------------------------------------------------- the networks
def check_teacher(teacher_type: str, teacher_keys: Keys) -> None:
    """Raise ``ValueError`` unless the teacher is a classifier of crops."""
    if "crops.logits" not in teacher_keys:
        raise ValueError(
            "DICOD needs a classifier of crops as teacher, but KD.TEACHER.TYPE is "
            f"'{teacher_type}'; set it to 'ClassifierTeacher' and KD.TEACHER.WEIGHTS to a "
            "checkpoint of projects/DICOD/train_classifier.py, or set KD.DICOD.CLS.ENABLED to "
            "False and KD.DICOD.LOC.FEAT_WEIGHT to 0.0: the remaining term needs no teacher"
        )


def check_numbers(num_classes: int, teacher_keys: Keys) -> None:
    """Raise ``ValueError`` if student and classifier have different numbers of classes.

    The trainer compares the names and their order.
    """
    theirs = teacher_keys["crops.logits"].channels
    if theirs != num_classes:
        raise ValueError(
            f"KD.DICOD.CLS compares classes, but the student has {num_classes} (NUM_CLASSES of its "
            f"head) and the classifier of KD.TEACHER.WEIGHTS {theirs}; train both on the same "
            "classes, or set KD.DICOD.CLS.ENABLED to False"
        )


def check_train_on_pred_boxes(cfg, student_keys: Keys) -> None:
    """Raise ``ValueError`` if a two-stage student overwrites the boxes that it sampled."""
    if "proposals" in student_keys and cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES is True for the student: its sampled boxes are "
            "then overwritten, and its predictions would be decoded from the wrong ones; set it to "
            "False"
        )
