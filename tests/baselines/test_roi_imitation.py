"""RoIImitation against torchvision's RoIAlign, box by box."""

import math

import pytest
import torch
from torchvision.ops import roi_align

from kd_d2.blocks import DenseProposals
from tests.baselines.feature_cases import kd_model, networks, run_step, terms_of
from tests.baselines.prediction_cases import check_two_steps, gradients_reach
from tests.fixtures import teacher_of, tiny_batch, tiny_model

PAIRS = [
    ("GFL", "GFL"),
    ("RetinaNet", "RetinaNet"),
    ("FCOS", "FCOS"),
    ("ATSS", "ATSS"),
    ("GeneralizedRCNN", "GeneralizedRCNN"),
    ("Cascade", "GeneralizedRCNN"),
    ("C4", "C4"),
    ("RetinaNet", "GeneralizedRCNN"),
]


def _terms(pair, arch, batch=None, **options):
    model = kd_model("RoIImitation", *pair, arch, **options)
    return terms_of(run_step(model, batch or tiny_batch()))


def _maps(model, batch):
    """stride -> pyramid level that the head reads."""
    with torch.no_grad():
        maps = model.backbone(model.preprocess_image(batch).tensor)
    names = getattr(model, "head_in_features", None) or model.roi_heads.box_in_features
    shapes = model.backbone.output_shape()
    return {shapes[name].stride: maps[name] for name in names}


def _pooled(maps, strides, image, box):
    """Features of one box, from the level of its size."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    level = math.floor(4 + math.log2(math.sqrt(area) / 224 + 1e-8))
    stride = min(max(2**level, strides[0]), strides[-1])
    row = torch.tensor([[image, *box]])
    return roi_align(maps[stride], row, 7, 1 / stride, aligned=True)[0]


@pytest.mark.parametrize("arch, other", [p for p in PAIRS if p[0] not in ("C4", "Cascade")])
def test_ground_truth_boxes(arch, other):
    student, teacher = networks(arch, other)
    batch = tiny_batch()
    value = _terms((student, teacher), arch, batch)["feat"]
    ours, theirs = _maps(student, batch), _maps(teacher.model, batch)
    strides = sorted(set(ours) & set(theirs))
    differences = []
    for image, x in enumerate(batch):
        for box in x["instances"].gt_boxes.tensor.tolist():
            s, t = (_pooled(m, strides, image, box) for m in (ours, theirs))
            differences.append((s - t).square().mean())
    assert len(differences) == 5
    assert value.item() == pytest.approx(torch.stack(differences).mean().item(), rel=1e-4)


@pytest.mark.parametrize("arch, other", PAIRS)
@pytest.mark.parametrize("rois", ["gt", "student"])
def test_two_steps(arch, other, rois):
    if arch == "C4":
        pair = tiny_model("C4", 0), teacher_of(tiny_model("C4", 1))
    else:
        pair = networks(arch, other)
    model = kd_model("RoIImitation", *pair, arch, ROIS=rois)
    check_two_steps(model, pair[1], tiny_batch(num_gt=(3, 0)))


@pytest.mark.parametrize("arch", ["GFL", "RetinaNet", "FCOS", "ATSS"])
def test_boxes_of_a_dense_student(arch):
    """Inside the image, best first, suppressed against each other, and those of their anchors."""
    student, teacher = networks(arch)
    model, batch = kd_model("RoIImitation", student, teacher, arch, ROIS="student"), tiny_batch()
    with model.tap.observe(student, model._student_needs) as observation:
        run_step(model, batch)
        run = observation
    ctx = model._context(batch, run, 0)
    rois = DenseProposals(num=20, candidates=60, iou=0.5)
    rois.bind(model.tap.keys(student), teacher.keys)
    for n, (found, x) in enumerate(zip(rois.instances(ctx), batch)):
        boxes = found.proposal_boxes.tensor
        height, width = x["image"].shape[-2:]
        assert 1 <= len(found) <= 20
        assert (boxes >= 0).all() and (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
        assert (found.objectness_logits.diff() <= 0).all()
        for i, a in enumerate(boxes.tolist()):
            for b in boxes[:i].tolist():
                w, h = (max(0.0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
                union = sum((z[2] - z[0]) * (z[3] - z[1]) for z in (a, b)) - w * h
                assert w * h / union <= 0.5
        # each is the decoded, clipped prediction at its anchor
        anchors = torch.cat([a.tensor for a in ctx.student["anchors"]])[found.anchor]
        assert len(set(found.anchor.tolist())) == len(found) and len(anchors) == len(boxes)


def test_adapter_and_student_that_is_its_teacher():
    pair = tiny_model("GFL", 0), teacher_of(tiny_model("GFL", 0))
    assert _terms(pair, "GFL")["feat"].item() == 0.0
    student, teacher = networks("GFL", "GFL", **{"MODEL.FPN.OUT_CHANNELS": 64})
    model = kd_model("RoIImitation", student, teacher, KERNEL_SIZE=3)
    found = {n: tuple(p.shape) for n, p in model.distillers.named_parameters()}
    assert set(found.values()) == {(64, 32, 3, 3), (64,)} and len(found) == 2
    value = terms_of(run_step(model, tiny_batch()))["feat"]
    assert value > 0 and len(gradients_reach(value, model.distillers)) == 2
    assert "head.cls_score.weight" not in gradients_reach(value, student)
    with pytest.raises(ValueError, match="32 channels.*64"):
        kd_model("RoIImitation", student, teacher, ADAPTER="none")


@pytest.mark.parametrize("num_gt, rois", [(0, "gt"), (0, "student")])
def test_no_ground_truth(num_gt, rois):
    student, teacher = networks("GFL")
    value = _terms((student, teacher), "GFL", tiny_batch(num_gt=0), ROIS=rois)["feat"]
    assert value.isfinite() and value.requires_grad and (value == 0) == (rois == "gt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    pair = networks("GFL")
    expected = _terms(pair, "GFL")["feat"].item()
    with torch.autocast("cpu", dtype):
        value = _terms(pair, "GFL")["feat"]
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=0.1)


def test_errors():
    student, teacher = networks("GFL")
    with pytest.raises(ValueError, match="KD.ROIIMITATION.ROIS"):
        kd_model("RoIImitation", student, teacher, ROIS="anchors")
    with pytest.raises(ValueError, match="KD.ROIIMITATION.ADAPTER"):
        kd_model("RoIImitation", student, teacher, ADAPTER="linear")
