"""The L1 penalty on batch-norm weights: which, how much, and where its gradient arrives."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from kd_d2.distillation import build_distillers
from kd_d2.engine import KDTrainer
from kd_d2.projects.jointdetnas import parse
from kd_d2.projects.jointdetnas.sparsity import norm_weights
from tests.fixtures import tiny_batch
from tests.projects.jointdetnas.cases import ALL, MOVED, STEM, bottom_up, student, student_cfg


def kd_cfg(**more):
    return student_cfg(MOVED, **{"KD.ENABLED": True, "KD.DISTILLERS": ("BNSparsity",), **more})


@pytest.mark.parametrize("name", sorted(ALL))
def test_all_norms_of_the_four_stages(name):
    """Rankable channels and the last norm of every block; neither stem nor pyramid."""
    model = student(ALL[name], **{"MODEL.FPN.NORM": "BN"})
    arch = parse(ALL[name], STEM)
    found = norm_weights(model)
    outs = sum(arch.block(p).out_channels for p in arch.positions)
    assert sum(len(w) for w in found) == arch.num_rankable_channels + outs
    named = {id(p): n for n, p in model.named_parameters()}
    assert all(".res" in named[id(w)] and named[id(w)].endswith("norm.weight") for w in found)


def test_value_and_gradient_in_training():
    torch.manual_seed(0)
    model = KDTrainer.build_model(kd_cfg(**{"KD.BNSPARSITY.WEIGHT": 0.5})).train()
    assert model.teacher is None
    body = bottom_up(model.student)
    weights = norm_weights(model.student)
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
        body.res3[1].conv2.norm.weight[:3] = torch.tensor([1.0, -2.0, 0.0])
    with EventStorage(0) as storage:
        losses = model(tiny_batch())
        logged = storage.latest()["kd_raw/bnsparsity/sparsity"][0]
    loss = losses["loss_kd/bnsparsity/sparsity"]
    assert loss.item() == pytest.approx(1.5) and logged == pytest.approx(3.0)
    loss.backward()
    expected = [0.5, -0.5] + [0.0] * 6
    assert body.res3[1].conv2.norm.weight.grad.tolist() == expected
    # nothing else gets a gradient of this term
    assert not body.res3[1].conv2.norm.weight.grad[2:].any()
    ours = {id(w) for w in weights}
    assert all(p.grad is None for p in model.parameters() if id(p) not in ours)


def test_paper_default_and_schedule():
    cfg = kd_cfg()
    distillers, schedules = build_distillers(cfg, {}, {})
    assert distillers["bnsparsity"].weights == {"sparsity": 1e-5}
    assert not distillers["bnsparsity"].needs_teacher
    assert schedules["bnsparsity"](0) == 1.0


def test_under_autocast_the_sum_is_in_full_precision():
    model = KDTrainer.build_model(kd_cfg()).train()
    with EventStorage(0), torch.autocast("cpu", torch.bfloat16):
        losses = model(tiny_batch())
    term = losses["loss_kd/bnsparsity/sparsity"]
    expected = 1e-5 * sum(w.abs().sum().item() for w in norm_weights(model.student))
    assert term.dtype == torch.float32 and term.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone"}, "BNSparsity is for MODEL.BACKBONE"),
        ({"MODEL.RESNETS.NORM": "FrozenBN"}, "MODEL.RESNETS.NORM is 'FrozenBN'"),
        ({"MODEL.RESNETS.NORM": ""}, "MODEL.RESNETS.NORM is ''"),
    ],
)
def test_students_without_trained_norms_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_distillers(kd_cfg(**options), {}, {})
