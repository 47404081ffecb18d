"""Table 5: a frozen MimicDet with a backbone of its own teaches."""

import pytest
import torch

from kd_d2.distillation import KDModel, build_distillers, build_tap
from tests.fixtures import teacher_of, tiny_batch
from tests.projects.mimicdet.whole import WITHOUT_P2, losses_of, mimicdet_cfg, mimicdet_model

TEACHER = {
    "MODEL.MIMICDET.EVAL_HEAD": "teacher",
    "MODEL.MIMICDET.S_HEAD.ENABLED": False,
    "MODEL.MIMICDET.MIMIC.WEIGHT": 0.0,
}
STUDENT = {
    **WITHOUT_P2,
    "MODEL.MIMICDET.T_HEAD.ENABLED": False,
    "MODEL.MIMICDET.TEACHER.MODE": "separate",
    "KD.ENABLED": True,
    "KD.DISTILLERS": ("MimicDetTeacher",),
}
LABEL = "loss_kd/mimicdetteacher"


def pair(student=(), teacher=()):
    cfg = mimicdet_cfg(**STUDENT, **dict(student))
    network = mimicdet_model(0, **STUDENT, **dict(student))
    guide = teacher_of(mimicdet_model(1, **TEACHER, **dict(teacher)))
    keys = build_tap(network).keys(network)
    distillers, schedules = build_distillers(cfg, keys, guide.keys)
    return KDModel(student=network, distillers=distillers, teacher=guide, schedules=schedules)


def cosine_distance(ours, theirs):
    norms = ours.norm(dim=1).clamp(min=0.01) * theirs.norm(dim=1).clamp(min=0.01)
    return (1 - (ours * theirs).sum(dim=1) / norms).mean()


def test_losses_and_gradients():
    """Eq. 1 by hand on the boxes that the student sampled; only the student learns from it."""
    model = pair().train()
    boxes = []
    model.student.sampler.register_forward_hook(lambda module, args, out: boxes.extend(out))
    losses, _ = losses_of(model, tiny_batch())
    own = {"loss_refine_cls", "loss_refine_reg", "loss_s_cls", "loss_s_reg"}
    assert set(losses) == own | {f"{LABEL}/cls", f"{LABEL}/reg"}

    with torch.no_grad():
        student, teacher = model.student, model.teacher.model
        images = student.preprocess_image(tiny_batch())
        features = student.backbone(images.tensor)
        levels = [features[name] for name in student.head_in_features]
        _, deltas = student.refinement.rpn_head(levels)
        ours = student.s_head.predict(student.s_head(levels, deltas), boxes)
        features = teacher.backbone(teacher.preprocess_image(tiny_batch()).tensor)
        names = ["p2", "p3", "p4", "p5", "p6"]
        theirs = teacher.t_head.features([features[name] for name in names], boxes)
    assert len(ours.logits) == 48
    expected = cosine_distance(ours.logits, theirs.logits).item()
    assert losses[f"{LABEL}/cls"].item() == pytest.approx(expected, rel=1e-3)
    expected = cosine_distance(ours.reg_feature.relu(), theirs.reg_feature.relu()).item()
    assert losses[f"{LABEL}/reg"].item() == pytest.approx(expected, rel=1e-3)

    (losses[f"{LABEL}/cls"] + losses[f"{LABEL}/reg"]).backward()
    assert all(p.grad is None for p in model.teacher.model.parameters())
    touched = {
        name for name, p in model.student.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert any(name.startswith("backbone.fpn") for name in touched)
    assert any(name.startswith("head.projections") for name in touched)
    assert not any(name.startswith("refinement") for name in touched)
    assert not any("t_head" in name or "teacher" in name for name in model.state_dict())


def test_all_parameters_get_a_gradient_without_ground_truth():
    model = pair().train()
    losses, _ = losses_of(model, tiny_batch(num_gt=0))
    sum(losses.values()).backward()
    names = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert names == []


def test_unsplit_heads_and_weight():
    light = {"MODEL.MIMICDET.T_HEAD.VARIANT": "light"}
    once, _ = losses_of(pair(light, light).train(), tiny_batch())
    assert f"{LABEL}/feature" in once and f"{LABEL}/cls" not in once
    heavier = {**light, "MODEL.MIMICDET.MIMIC.WEIGHT": 3.0}
    thrice, _ = losses_of(pair(heavier, light).train(), tiny_batch())
    name = f"{LABEL}/feature"
    assert thrice[name].item() == pytest.approx(3 * once[name].item(), rel=1e-5)


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        ({"MODEL.MIMICDET.TEACHER.MODE": "shared", "MODEL.MIMICDET.MIMIC.WEIGHT": 0.0}, {}, "set"),
        ({}, {"MODEL.ROI_HEADS.NUM_CLASSES": 4}, "NUM_CLASSES"),
        ({}, {"MODEL.MIMICDET.T_HEAD.VARIANT": "heavy"}, "VARIANT"),
        ({}, {"MODEL.ROI_BOX_HEAD.FC_DIM": 40}, "FC_DIM"),
    ],
)
def test_what_does_not_fit_is_said(student, teacher, message):
    merged = {**STUDENT, **student}
    cfg = mimicdet_cfg(**merged)
    network = mimicdet_model(0, **merged)
    guide = teacher_of(mimicdet_model(1, **{**TEACHER, **teacher}))
    with pytest.raises(ValueError, match=message):
        build_distillers(cfg, build_tap(network).keys(network), guide.keys)


def test_a_teacher_without_t_head_is_refused():
    network = mimicdet_model(0, **STUDENT)
    guide = teacher_of(mimicdet_model(1, **STUDENT))
    keys = build_tap(network).keys(network)
    with pytest.raises(ValueError, match="needs 'head.t' of the teacher"):
        build_distillers(mimicdet_cfg(**STUDENT), keys, guide.keys)
