"""DICOD on batches without objects, odd sizes, in half precision, and with a useless classifier."""

import logging

import pytest
import torch
from torch.nn import functional as F

from kd_d2.modeling.layers import crop_boxes
from kd_d2.projects.dicod.teacher_check import TeacherCheck
from tests.fixtures import DENSE, TWO_STAGE, tiny_batch
from tests.projects.dicod.detectors import (
    TERMS,
    batch_for,
    context_of,
    detector,
    kd,
    only,
    prefix,
    step,
)

STUDENTS = ("SSD", "RetinaNet", "GeneralizedRCNN")
ALL_STUDENTS = ("SSD", *DENSE, *TWO_STAGE)
every_kind = pytest.mark.parametrize("student", STUDENTS)


# ---------------------------------------------------------------------------------- odd batches
@pytest.mark.parametrize("student", ALL_STUDENTS)
def test_a_batch_without_objects(student):
    model = detector(student)
    model.teacher.logits = model.teacher.features = None  # not called
    losses, storage = step(model, batch_for(student, num_gt=0))
    assert set(kd(losses)) == {prefix(term) for term in TERMS}
    assert all(value == 0 and value.requires_grad for value in kd(losses).values())
    sum(kd(losses).values()).backward()
    heads = [p for n, p in model.named_parameters() if "cls_score" in n or "bbox_pred" in n]
    if student == "Cascade":
        heads = list(model.student.roi_heads.box_predictor[2].parameters())
    assert heads and all(p.grad is not None and not p.grad.any() for p in heads)
    assert storage.latest()["dicod/num_pos"][0] == 0
    assert "dicod/teacher_top1_on_gt" not in storage.latest()


@pytest.mark.parametrize("student", ["SSD", "GeneralizedRCNN", "C4"])
def test_an_image_without_objects(student):
    model = detector(student)
    losses, _ = step(model, batch_for(student, num_gt=(0, 3)))
    assert all(torch.isfinite(value) and value > 0 for value in kd(losses).values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_divisor_counts_images_without_positives():
    """Losses 1, 2, 3 of three positives in one of two images: 6 / 4, not 6 / 3."""
    model = detector("SSD", **only("cls"))
    batch = batch_for("SSD", num_gt=(3, 0))
    distiller = model.distillers["dicod"]
    distiller.mode = lambda s, t: s.sum() * 0 + torch.arange(1.0, 1 + len(s))
    losses, storage = step(model, batch)
    number = round(2 * storage.latest()["dicod/num_pos"][0])
    assert losses[prefix("cls")].item() == pytest.approx(
        0.4 * number * (number + 1) / 2 / (number + 1)
    )


@pytest.mark.parametrize("student", ["RetinaNet", "GeneralizedRCNN"])
def test_odd_sizes(student):
    model = detector(student)
    losses, _ = step(model, tiny_batch(sizes=((97, 131), (65, 33)), num_gt=(2, 1)))
    assert all(torch.isfinite(value) and value > 0 for value in kd(losses).values())
    sum(losses.values()).backward()


def test_boxes_end_with_their_image_not_with_the_padding():
    """Pixels under boxes that leave a padded image, against crops of each image by itself."""
    model = detector("RetinaNet", teacher=None, **only("loc_obj"))
    batch = tiny_batch(sizes=((128, 128), (70, 90)), num_gt=(2, 3))
    losses, _ = step(model, batch)
    ctx = context_of(model, batch)
    found = model.distillers["dicod"].positives(ctx)
    total, pairs = 0.0, zip(found.boxes.split(found.counts), found.gt_boxes.split(found.counts))
    for image, (height, width), (boxes, gt) in zip(ctx.images, ctx.image_sizes, pairs, strict=True):
        alone = image[None, :, :height, :width]
        crops = [
            F.adaptive_avg_pool2d(crop_boxes(alone, [x], 32, [(height, width)]), 4)
            for x in (boxes, gt)
        ]
        total += (crops[0] - crops[1]).abs().mean(dim=(1, 2, 3)).sum()
    beyond = found.boxes[found.counts[0] :, 2:] > torch.tensor([90.0, 70.0])
    assert beyond.any()
    # at the border a crop of the padded tensor reads the padding's zeros, as beyond the tensor's
    torch.testing.assert_close(
        losses[prefix("loc_obj")], 0.15 * total / len(found), rtol=1e-3, atol=0
    )


@every_kind
def test_autocast(student):
    """Losses are fp32 and finite, and near those in full precision."""
    full, _ = step(detector(student), batch_for(student))
    model = detector(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = step(model, batch_for(student))
    sum(losses.values()).backward()
    for name, value in kd(losses).items():
        assert value.dtype == torch.float32 and torch.isfinite(value)
        assert value.item() == pytest.approx(full[name].item(), rel=0.3)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ------------------------------------------------------------------------------- the classifier
@pytest.mark.parametrize(
    "classes, right, warns",
    [(10, 0, True), (10, 9, True), (10, 10, False), (10, 50, False), (2, 25, True), (1, 50, False)],
)
def test_a_classifier_at_chance(caplog, classes, right, warns):
    """50 steps with one object each; the bound of ten classes is 5 + 2 * 2.12."""
    check = TeacherCheck(classes)
    with caplog.at_level(logging.WARNING):
        for i in range(49):
            check(int(i < right), 1)
        assert not caplog.records
        check(int(49 < right), 1)
        found = [r.getMessage() for r in caplog.records]
        # once only
        for _ in range(60):
            check(0, 1)
    assert len(caplog.records) == len(found) == int(warns)
    if warns:
        share = f"{2 * right:.1f}% of 50 crops"
        assert share in found[0] and f"chance ({100 / classes:.1f}%)" in found[0]


def test_the_distiller_looks_at_the_classifiers_first_steps(caplog):
    model = detector("SSD", **only("cls"))
    seen = []
    model.distillers["dicod"]._check = lambda right, total: seen.append((right, total))
    _, storage = step(model, batch_for("SSD"))
    assert seen == [(3, 5)] and storage.latest()["dicod/teacher_top1_on_gt"][0] == 60
    step(model, batch_for("SSD", num_gt=0))
    assert len(seen) == 1
