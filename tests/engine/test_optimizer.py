"""Learning rates, weight decay and clipping."""

import pytest
import torch
from detectron2.solver import build_optimizer as build_d2_optimizer
from torch import nn

from kd_d2.distillation import KDModel, build_distillers, build_tap
from kd_d2.engine.optimizer import build_optimizer
from tests.engine.support import THREE_DISTILLERS, user_distiller  # noqa: F401 (fixture)
from tests.fixtures import teacher_of, tiny_cfg, tiny_model

SOLVER = {
    "SOLVER.BASE_LR": 0.1,
    "SOLVER.WEIGHT_DECAY": 0.001,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SOLVER.WEIGHT_DECAY_BIAS": 0.002,
    "SOLVER.BIAS_LR_FACTOR": 2.0,
    "MODEL.RESNETS.NORM": "BN",
}


def hyperparameters(optimizer, model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("meta_arch", ["RetinaNet", "GeneralizedRCNN"])
def test_groups_without_kd_are_detectron2s(meta_arch):
    cfg = tiny_cfg(meta_arch, **SOLVER)
    model = tiny_model(meta_arch, **SOLVER)
    next(model.parameters()).requires_grad_(False)
    theirs, ours = build_d2_optimizer(cfg, model), build_optimizer(cfg, model)
    assert type(ours) is type(theirs) and ours.defaults == theirs.defaults
    assert len(ours.param_groups) == len(theirs.param_groups) == 3
    for a, b in zip(ours.param_groups, theirs.param_groups):
        assert [id(p) for p in a.pop("params")] == [id(p) for p in b.pop("params")]
        assert a == b


def kd_model(cfg):
    student = tiny_model("RetinaNet", **SOLVER)
    teacher = teacher_of(tiny_cfg("RetinaNet"))
    distillers, _ = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    return KDModel(student=student, distillers=distillers, teacher=teacher)


def test_factor_and_overrides_reach_the_distillers_only(user_distiller):  # noqa: F811
    cfg = tiny_cfg("RetinaNet", **{**THREE_DISTILLERS, **SOLVER, "KD.ADAPTER_LR_FACTOR": 3.0})
    model = kd_model(cfg)
    groups = hyperparameters(build_optimizer(cfg, model), model)
    plain = hyperparameters(build_d2_optimizer(cfg, model.student), model.student)
    assert set(groups) == {f"student.{name}" for name in plain} | {
        "distillers.queue.adapter.weight",
        "distillers.queue.adapter.bias",
    }
    assert {k: groups[f"student.{k}"] for k in plain} == plain
    assert groups["distillers.queue.adapter.weight"] == pytest.approx((0.3, 0.001))

    overrides = {"adapter.weight": {"lr_factor": 0.5, "weight_decay": 0.25}}
    model.distillers["queue"].optimizer_overrides = lambda: overrides
    changed = hyperparameters(build_optimizer(cfg, model), model)
    assert changed.pop("distillers.queue.adapter.weight") == pytest.approx((0.15, 0.25))
    assert changed.items() < groups.items()

    model.distillers["queue"].optimizer_overrides = lambda: {"adaptor.weight": {"lr_factor": 2.0}}
    with pytest.raises(ValueError, match="'queue'.*'adaptor.weight'"):
        build_optimizer(cfg, model)


def one_step(model, gradients, **clip):
    """Parameters after one step from given gradients."""
    cfg = tiny_cfg("RetinaNet", **{f"SOLVER.CLIP_GRADIENTS.{k}": v for k, v in clip.items()})
    optimizer = build_optimizer(cfg, model)
    for parameter, gradient in zip(model.parameters(), gradients):
        parameter.grad = gradient.clone()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_full_model_clipping_is_one_norm_over_everything(norm_type):
    torch.manual_seed(0)
    weights = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).state_dict()
    gradients = [torch.randn_like(w) * (10.0 if w.dim() > 1 else 0.1) for w in weights.values()]

    def model():
        result = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        result.load_state_dict(weights)
        return result

    norm = torch.cat([g.flatten() for g in gradients]).norm(norm_type).item()
    clip = {"ENABLED": True, "CLIP_TYPE": "norm", "NORM_TYPE": norm_type, "CLIP_VALUE": norm / 4}
    clipped = one_step(model(), gradients, FULL_MODEL=True, **clip)
    by_hand = one_step(model(), [g / (4 + 4e-6 / norm) for g in gradients])
    for ours, theirs in zip(clipped, by_hand):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)

    reference = model()
    for parameter, gradient in zip(reference.parameters(), gradients):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), norm / 4, norm_type)
    expected = one_step(model(), [p.grad for p in reference.parameters()])
    assert all(map(torch.equal, clipped, expected))

    alone = one_step(model(), gradients, FULL_MODEL=False, **clip)
    # small gradients keep their size if each parameter is clipped by itself
    assert not any(torch.equal(a, b) for a, b in zip(alone[1::2], clipped[1::2]))
    unclipped = one_step(model(), gradients)
    assert torch.equal(alone[1], unclipped[1])
    within = one_step(model(), gradients, FULL_MODEL=True, **{**clip, "CLIP_VALUE": norm * 2})
    assert all(map(torch.equal, within, unclipped))


def test_full_model_clipping_knows_norms_only():
    cfg = tiny_cfg("RetinaNet")
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(
        ["ENABLED", True, "FULL_MODEL", True, "CLIP_TYPE", "value"]
    )
    with pytest.raises(ValueError, match="CLIP_TYPE 'norm', got 'value'"):
        build_optimizer(cfg, nn.Linear(2, 2))
