"""Toy pairs of detectors with GDetKD, and one training step of them."""

import copy
import functools

import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from kd_d2.distillation import KDModel, build_distillers, build_tap
from tests.fixtures import TWO_STAGE, teacher_of, tiny_batch, tiny_cfg, tiny_model

SEVEN = {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7}  # what SGFI's embedding needs
KEYS = {
    **SEVEN,
    "KD.DISTILLERS": ("GDetKD",),
    "KD.GDETKD.CKD.QUEUE_SIZE": 96,
    "KD.GDETKD.DENSE.NUM_SAMPLES": 24,
}
OFF = {
    "feat": {"KD.GDETKD.FEAT.MODE": "none"},
    "ckd": {"KD.GDETKD.CKD.ENABLED": False},
    "cls": {"KD.GDETKD.CLS.WEIGHT": 0.0},
    "reg": {"KD.GDETKD.REG.MODE": "off"},
}
ALL_TERMS = tuple(OFF)


def only(*terms):
    """Keys that switch off all terms but ``terms``."""
    return {k: v for name in OFF if name not in terms for k, v in OFF[name].items()}


def prefix(name):
    return f"loss_kd/gdetkd/{name}"


@functools.lru_cache(None)
def _tap_keys(family, overrides):
    model = tiny_model(family, **dict(overrides))
    return build_tap(model).keys(model)


def _overrides(keys, teacher_keys):
    """Changes of the student's and of the teacher's network."""
    student = {k: v for k, v in keys.items() if k.startswith("MODEL.")}
    classes = {k: v for k, v in student.items() if k.endswith("NUM_CLASSES")}
    return {**SEVEN, **student}, {**SEVEN, **classes, **(teacher_keys or {})}


def distiller_of(
    student="GeneralizedRCNN", teacher="GeneralizedRCNN", *, teacher_keys=None, **keys
):
    """Return the distiller of a pair without the networks; see :func:`pair`."""
    ours, theirs = _overrides(keys, teacher_keys)
    found = _tap_keys(student, tuple(ours.items())), _tap_keys(teacher, tuple(theirs.items()))
    return build_distillers(tiny_cfg(student, **{**KEYS, **keys}), *found)[0]["gdetkd"]


def pair(student="GeneralizedRCNN", teacher="GeneralizedRCNN", *, teacher_keys=None, **keys):
    """Return the KDModel of a pair.

    Args:
        teacher_keys: changes of the teacher.
        keys: of the student's config.
    """
    ours, theirs = _overrides(keys, teacher_keys)
    model = tiny_model(student, seed=1, **ours)
    teacher = teacher_of(tiny_model(teacher, seed=2, **theirs))
    cfg = tiny_cfg(student, **{**KEYS, **keys})
    torch.manual_seed(3)
    distillers, schedules = build_distillers(cfg, build_tap(model).keys(model), teacher.keys)
    model = KDModel(student=model, distillers=distillers, teacher=teacher, schedules=schedules)
    return model.train()


def step(model, batch=None, seed=0, iteration=0):
    """Return the losses and the storage of one training forward."""
    seed_all_rng(seed)
    with EventStorage(iteration) as storage:
        losses = model(tiny_batch() if batch is None else batch)
    return losses, storage


def gradients(model):
    return {name: copy.copy(p.grad) for name, p in model.named_parameters()}


PAIRS = [(s, t) for s in (*TWO_STAGE, "RetinaNet", "FCOS") for t in TWO_STAGE]
