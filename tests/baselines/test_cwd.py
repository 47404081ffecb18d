"""CWD against hand-worked distributions, and the pairs it refuses."""

import math

import pytest
import torch

from kd_d2.baselines import CWD
from tests.baselines.feature_cases import (
    ToyContext,
    kd_model,
    neck_keys,
    networks,
    run_step,
    terms_of,
)
from tests.fixtures import tiny_batch, tiny_cfg

TEACHER = torch.tensor([0.0, math.log(3)]).reshape(1, 1, 1, 2)
STUDENT = torch.zeros(1, 1, 1, 2)


def _value(student, teacher, **options):
    keys = neck_keys(student.shape[1])
    distiller = CWD(student_keys=keys, teacher_keys=keys, location="neck", **options)
    images = [()] * len(student)
    ctx = ToyContext({"neck": [student]}, {"neck": [teacher]}, images)
    distiller(ctx)
    return ctx.raw["cwd/neck"].item()


def test_worked_out():
    """Teacher (1/4, 3/4), student (1/2, 1/2): ln 2 - H = 0.130812."""
    assert _value(STUDENT, TEACHER) == pytest.approx(0.130812, abs=1e-6)
    assert _value(STUDENT, TEACHER, temperature=2.0) == pytest.approx(0.145363, abs=1e-6)
    assert _value(TEACHER, STUDENT) == pytest.approx(0.143841, abs=1e-6)
    assert _value(STUDENT + 5, TEACHER) == pytest.approx(0.130812, abs=1e-6)


def test_channels_and_images_are_averaged_levels_summed():
    twice = [x.repeat(1, 2, 1, 1) for x in (STUDENT, TEACHER)]
    assert _value(*twice) == pytest.approx(0.130812, abs=1e-6)
    images = [torch.cat([x, x]) for x in (STUDENT, TEACHER)]
    assert _value(*images) == pytest.approx(0.130812, abs=1e-6)
    keys = neck_keys(1, (8, 16))
    distiller = CWD(student_keys=keys, teacher_keys=keys, location="neck", weight=10.0)
    ctx = ToyContext({"neck": [STUDENT] * 2}, {"neck": [TEACHER] * 2})
    assert distiller(ctx)["neck"].item() == pytest.approx(10 * 2 * 0.130812, abs=1e-5)


@pytest.mark.parametrize("arch", ["GFL", "RetinaNet"])
def test_class_logits_of_real_networks(arch):
    """Against a loop over images and channels."""
    student, teacher = networks(arch)
    batch = tiny_batch()
    model = kd_model("CWD", student, teacher, arch)
    found = terms_of(run_step(model, batch))
    expected = 0.0
    with torch.no_grad():
        sides = []
        for network in (student, teacher.model):
            features = network.backbone(network.preprocess_image(batch).tensor)
            sides.append(network.head([features[f] for f in network.head_in_features])[0])
        for ours, theirs in zip(*sides):
            terms = []
            for s, t in zip(ours.flatten(0, 1), theirs.flatten(0, 1)):
                p, q = t.flatten().double().softmax(0), s.flatten().double().softmax(0)
                terms.append((p * (p.log() - q.log())).sum())
            expected += 5.0 * torch.stack(terms).mean()
    assert set(found) == {"cls"}
    assert found["cls"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_official_weights():
    assert tiny_cfg("GFL").KD.CWD.TEMPERATURE == 1.0
    for location, weight in (("cls", 5.0), ("neck", 10.0)):
        model = kd_model("CWD", *networks(), LOCATION=location)
        assert model.distillers["cwd"].weights == {location: weight}
    assert kd_model("CWD", *networks(), WEIGHT=2.0).distillers["cwd"].weights == {"cls": 2.0}


@pytest.mark.parametrize(
    "arch, options, message",
    [
        ("GFL", {"LOCATION": "reg"}, "KD.CWD.LOCATION must be one of .*'cls', 'neck'.*'reg'"),
        ("GFL", {"TEMPERATURE": 0.0}, "KD.CWD.TEMPERATURE must be positive, got 0.0"),
        ("GFL", {"WEIGHT": -2.0}, "KD.CWD.WEIGHT must be -1.0 .* got -2.0"),
        ("GeneralizedRCNN", {}, "CWD compares 'pred.cls' .* student has none: both must be dense"),
    ],
)
def test_values_that_cannot_work(arch, options, message):
    with pytest.raises(ValueError, match=message):
        kd_model("CWD", *networks(arch), arch, **options)


@pytest.mark.parametrize(
    "arch, overrides, options, message",
    [
        ("GFL", {"MODEL.GFL.NUM_CLASSES": 4}, {}, "'pred.cls'.* channels differ: student 3, teach"),
        (
            "RetinaNet",
            {"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 2.0]]},
            {},
            "CWD compares 'anchors' .* signature differ",
        ),
        (
            "GFL",
            {"MODEL.FPN.OUT_CHANNELS": 64},
            {"LOCATION": "neck"},
            "CWD, term 'neck': 'neck' has 32 channels in the student and 64 in the teacher",
        ),
    ],
)
def test_networks_that_differ(arch, overrides, options, message):
    with pytest.raises(ValueError, match=message):
        kd_model("CWD", *networks(arch, **overrides), arch, **options)
