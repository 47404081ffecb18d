"""Toy detectors with DICOD and a small classifier, and one training step of them."""

import copy

import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from kd_d2.distillation import KDModel, build_distillers, build_tap
from kd_d2.projects.dicod.teacher import ClassifierTeacher
from tests.fixtures import tiny_batch, tiny_cfg, tiny_model
from tests.projects.dicod.crop_cases import small_classifier

TERMS = ("cls", "loc_obj", "loc_feat")
KEYS = {
    "KD.ENABLED": True,
    "KD.DISTILLERS": ("DICOD",),
    "KD.TEACHER.TYPE": "ClassifierTeacher",
    "KD.DICOD.LOC.SAMPLE_SIZE": 32,
}
OFF = {
    "cls": {"KD.DICOD.CLS.ENABLED": False},
    "loc_obj": {"KD.DICOD.LOC.OBJ_WEIGHT": 0.0},
    "loc_feat": {"KD.DICOD.LOC.FEAT_WEIGHT": 0.0},
}


def only(*terms):
    """Keys that switch all other terms off."""
    return {k: v for term, keys in OFF.items() if term not in terms for k, v in keys.items()}


def prefix(term):
    return f"loss_kd/dicod/{term}"


def kd(losses):
    """The distillation losses among those of a step."""
    return {k: v for k, v in losses.items() if k.startswith("loss_kd/")}


def batch_for(student, **kwargs):
    """A batch; SSD takes squares only, of others the second image is padded."""
    return tiny_batch(**({"sizes": ((128, 128),)} if student == "SSD" else {}), **kwargs)


def classifier(seed=2, **changes):
    torch.manual_seed(seed)
    return small_classifier(**changes)


def classifier_teacher(cfg, model=None, **changes):
    """The teacher of a student with config ``cfg``."""
    return ClassifierTeacher(
        model=model or classifier(**changes),
        student_mean=cfg.MODEL.PIXEL_MEAN,
        student_std=cfg.MODEL.PIXEL_STD,
        student_format=cfg.INPUT.FORMAT,
    )


def detector(student, *, teacher=True, model_keys=None, **keys):
    """Return the KDModel of a student with DICOD.

    Args:
        teacher: a ClassifierTeacher, True for a small one, or None.
        model_keys: changes of the student that make it another network.
        keys: of its config.
    """
    model_keys = model_keys or {}
    model = tiny_model(student, seed=1, **model_keys)
    cfg = tiny_cfg(student, **{**KEYS, **model_keys, **keys})
    teacher = classifier_teacher(cfg) if teacher is True else teacher
    theirs = teacher.keys if teacher is not None else {}
    distillers, schedules = build_distillers(cfg, build_tap(model).keys(model), theirs)
    model = KDModel(student=model, distillers=distillers, teacher=teacher, schedules=schedules)
    return model.train()


def step(model, batch, seed=0, iteration=0):
    """Return the losses and the storage of one training forward."""
    seed_all_rng(seed)
    with EventStorage(iteration) as storage:
        losses = model(batch)
    return losses, storage


def context_of(model, batch, seed=0):
    """Return what the distillers see of a step; ``path:roi_heads`` etc. is not among it."""
    seed_all_rng(seed)
    with EventStorage(), model.tap.observe(model.student, model._student_needs) as observation:
        model.student(batch)
        return model._context(batch, observation, 0)


def gradients(model):
    return {name: copy.copy(p.grad) for name, p in model.named_parameters()}
