"""FRS: the oracle of two cells, presets, warm-up, objectness of two-stage detectors."""

import pytest
import torch
from torch.nn import functional as F

from kd_d2.baselines import FRS
from kd_d2.distillation import KeyInfo, LossSchedule
from tests.baselines.feature_cases import (
    ToyContext,
    kd_model,
    level_keys,
    networks,
    run_step,
    terms_of,
)
from tests.fixtures import tiny_batch, tiny_cfg

KEYS = level_keys(**{"pred.cls": KeyInfo(2, (8,), (2,))})


def _cells(*values):
    """(1, C, 1, 2) from one tuple of channels per cell."""
    return torch.tensor(values).t().reshape(1, -1, 1, len(values))


P_T, P_S = _cells((0.8, 0.2), (0.1, 0.1)), _cells((0.4, 0.2), (0.1, 0.1))
MAPS = _cells((1.0, 1.0), (5.0, 5.0))


def test_worked_out():
    """w = (.8, .1): feat (1.6 + 5) / .9 = 7.333333, cls 1.259441."""
    distiller = FRS(student_keys=KEYS, teacher_keys=KEYS, adapter="none")
    student = {"neck.p3": torch.zeros_like(MAPS), "pred.cls": [P_S.logit()]}
    ctx = ToyContext(student, {"neck.p3": MAPS, "pred.cls": [P_T.logit()]}, image_size=(8, 16))
    weighted = distiller(ctx)
    assert ctx.raw["frs/feat"].item() == pytest.approx(7.333333, rel=1e-5)
    assert ctx.raw["frs/cls"].item() == pytest.approx(1.259441, rel=1e-5)
    assert weighted["feat"].item() == pytest.approx(0.005 * 7.333333, rel=1e-5)


def test_a_teacher_that_sees_nothing():
    """Scores of 0 divide by 1e-6, not by 0."""
    distiller = FRS(student_keys=KEYS, teacher_keys=KEYS, adapter="none")
    student = {"neck.p3": torch.zeros_like(MAPS), "pred.cls": [P_S.logit()]}
    nothing = torch.full_like(P_T, -200.0)
    ctx = ToyContext(student, {"neck.p3": MAPS, "pred.cls": [nothing]}, image_size=(8, 16))
    assert all(v.item() == 0.0 for v in distiller(ctx).values())


def test_two_stage_uses_objectness():
    student, teacher = networks("GeneralizedRCNN")
    batch = tiny_batch()
    model = kd_model("FRS", student, teacher, "GeneralizedRCNN", ADAPTER="none")
    found = terms_of(run_step(model, batch))
    feat, cls = 0.0, 0.0
    with torch.no_grad():
        sides = []
        for network in (student, teacher.model):
            features = network.backbone(network.preprocess_image(batch).tensor)
            levels = [features[f] for f in ("p2", "p3", "p4", "p5", "p6")]
            sides.append((levels, network.proposal_generator.rpn_head(levels)[0]))
        for s, t, ours, theirs in zip(sides[0][0], sides[1][0], sides[0][1], sides[1][1]):
            w = theirs.sigmoid().amax(1)
            feat += (w * (s - t).square().sum(1)).sum() / w.sum()
            bce = F.binary_cross_entropy_with_logits(ours, theirs.sigmoid(), reduction="none")
            cls += (w * bce.sum(1)).sum() / w.sum()
    assert found["feat"].item() == pytest.approx(0.002 * feat.item(), rel=1e-3)
    assert found["cls"].item() == pytest.approx(0.1 * cls.item(), rel=1e-3)


@pytest.mark.parametrize(
    "arch, feat, cls",
    [
        ("RetinaNet", 0.005, 0.02),
        ("FCOS", 0.01, 0.05),
        ("GFL", 0.1, 0.05),
        ("ATSS", 0.1, 0.05),
        ("GeneralizedRCNN", 0.002, 0.1),
    ],
)
def test_presets(arch, feat, cls):
    distiller = kd_model("FRS", *networks(arch), arch).distillers["frs"]
    assert distiller.weights == {"feat": feat, "cls": cls}
    layers = distiller.pair_terms["feat"].adapter.layers
    assert [tuple(layer.kernel_size) for layer in layers] == [(3, 3)] * 5


def test_warm_up():
    schedule = LossSchedule.from_node(tiny_cfg("GFL").KD.FRS.SCHEDULE, 90000)
    found = [schedule(i) for i in (0, 249, 499, 500)]
    assert found == pytest.approx([1 / 501, 250 / 501, 500 / 501, 1.0])


@pytest.mark.parametrize(
    "arch, overrides, message",
    [
        ("GFL", {"MODEL.GFL.NUM_CLASSES": 4}, "FRS compares 'pred.cls' .* student 3, teacher 4"),
        (
            "RetinaNet",
            {"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 2.0]]},
            "FRS compares 'anchors'",
        ),
    ],
)
def test_networks_that_differ(arch, overrides, message):
    with pytest.raises(ValueError, match=message):
        kd_model("FRS", *networks(arch, **overrides), arch)
