"""Positives of every family against the detectors' own matching, decoding and bookkeeping."""

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou

from kd_d2.distillation import KeyInfo, build_tap
from kd_d2.projects.dicod.positives import (
    DensePositives,
    TwoStagePositives,
    build_student_positives,
    index_of_gt,
)
from tests.fixtures import DENSE, TWO_STAGE, tiny_model
from tests.projects.dicod.detectors import batch_for, context_of, detector, only

NO_TEACHER = {"teacher": None, **only("loc_obj")}
K = 3


def observed(student, num_gt=(3, 2), seed=0, **model_keys):
    """Model, context and positives of one step; instances carry their number as a field."""
    model = detector(student, model_keys=model_keys, **NO_TEACHER)
    batch = batch_for(student, num_gt=num_gt)
    total = 0
    for x in batch:
        x["instances"].gt_number = torch.arange(len(x["instances"])) + total
        total += len(x["instances"])
    ctx = context_of(model, batch, seed)
    return model.student, ctx, model.distillers["dicod"].positives(ctx)


def check_objects(found, ctx):
    """Every positive points to the object of its own image that it was matched with."""
    gt_boxes = torch.cat([x.gt_boxes.tensor for x in ctx.gt_instances])
    gt_classes = torch.cat([x.gt_classes for x in ctx.gt_instances])
    assert torch.equal(gt_boxes[found.gt_index], found.gt_boxes)
    assert torch.equal(gt_classes[found.gt_index], found.labels)
    first = 0
    for count, x in zip(found.gt_index.split(found.counts), ctx.gt_instances, strict=True):
        assert all(first <= row < first + len(x) for row in count.tolist())
        first += len(x)
    assert sum(found.counts) == len(found) == len(found.boxes) == len(found.logits)


# ----------------------------------------------------------------------------------------- dense
@pytest.mark.parametrize("student", (*DENSE, "SSD"))
def test_dense_detectors(student):
    """Rows of the head's outputs, flattened by Detectron2's own function, decoded by its codec."""
    model, ctx, found = observed(student)
    check_objects(found, ctx)
    with torch.no_grad():
        images = model.preprocess_image(ctx.batched_inputs)
        maps = model.backbone(images.tensor)
        maps = [maps[name] for name in model.head_in_features]
        raw = model.head(maps)
        anchors = model.anchor_generator(maps)
        labels, boxes = model.label_anchors(anchors, ctx.gt_instances)
    classes = K + (student == "SSD")
    box_dim = getattr(model.box2box_transform, "box_dim", 4)
    dims = [classes, box_dim, 1][: len(raw)]
    logits, deltas = model._transpose_dense_predictions(list(raw), dims)[:2]
    logits, deltas = torch.cat(logits, dim=1), torch.cat(deltas, dim=1)
    anchors, k = Boxes.cat(anchors).tensor, 0
    for i in range(2):
        rows = [r for r, label in enumerate(labels[i].tolist()) if 0 <= label < K]
        assert found.counts[i] == len(rows) > 0
        for r in rows:
            expected = model.box2box_transform.apply_deltas(deltas[i, r][None], anchors[r][None])
            torch.testing.assert_close(found.boxes[k], expected[0])
            torch.testing.assert_close(found.logits[k], logits[i, r])
            assert torch.equal(found.gt_boxes[k], boxes[i][r]) and found.labels[k] == labels[i][r]
            k += 1
    assert found.logits.shape[1] == classes and found.boxes.dtype == torch.float32


@pytest.mark.parametrize("student", ["RetinaNet", "SSD"])
def test_objects_are_those_of_the_matcher(student):
    model, ctx, found = observed(student, num_gt=(5, 4))
    anchors = Boxes.cat(ctx.student["anchors"])
    expected, first = [], 0
    for x in ctx.gt_instances:
        ious = pairwise_iou(x.gt_boxes, anchors)
        if student == "SSD":
            matched = model.matcher(ious)
            expected.append(matched[matched >= 0] + first)
        else:
            matched, labels = model.anchor_matcher(ious)
            expected.append(matched[labels == 1] + first)
        first += len(x)
    assert torch.equal(found.gt_index, torch.cat(expected))
    # two objects may claim one default box
    assert len(set(found.gt_index.tolist())) >= 8


# ------------------------------------------------------------------------------------- two-stage
AGNOSTIC = {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}
RCNN = [
    ("GeneralizedRCNN", {}),
    ("GeneralizedRCNN", AGNOSTIC),
    ("C4", {}),
    ("Cascade", {}),
]


@pytest.mark.parametrize("student, keys", RCNN, ids=["rcnn", "agnostic", "c4", "cascade"])
def test_two_stage_detectors(student, keys):
    """Boxes by the predictor's own method."""
    model, ctx, found = observed(student, seed=3, **keys)
    check_objects(found, ctx)
    stage = 2 if student == "Cascade" else 0
    predictor = model.roi_heads.box_predictor
    predictor = predictor[stage] if student == "Cascade" else predictor
    proposals = ctx.student[f"proposals[{stage}]"]
    logits, deltas = ctx.student[f"roi.cls[{stage}]"], ctx.student[f"roi.box[{stage}]"]
    decoded = torch.cat(list(predictor.predict_boxes((logits, deltas), proposals)))
    k, row = 0, 0
    for p in proposals:
        for label, gt in zip(p.gt_classes.tolist(), p.gt_boxes.tensor):
            if label < K:
                boxes = decoded[row].view(-1, 4)
                torch.testing.assert_close(found.boxes[k], boxes[label if len(boxes) > 1 else 0])
                assert torch.equal(found.logits[k], logits[row])
                assert found.labels[k] == label and torch.equal(found.gt_boxes[k], gt)
                k += 1
            row += 1
    assert k == len(found) >= 5 and len(set(found.labels.tolist())) > 1
    assert found.counts == [int((p.gt_classes < K).sum()) for p in proposals]


def test_objects_are_those_that_detectron2_copied_to_the_proposals():
    """It copies every field of the targets whose name begins with "gt_"."""
    model, ctx, found = observed("GeneralizedRCNN", num_gt=(5, 4))
    proposals = ctx.student["proposals"]
    numbers = torch.cat([p.gt_number[p.gt_classes < K] for p in proposals])
    assert torch.equal(found.gt_index, numbers) and set(numbers.tolist()) == set(range(9))


def test_sigmoid_scores_leave_the_background_out():
    keys = {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True, "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": False}
    model, ctx, found = observed("GeneralizedRCNN", **keys)
    check_objects(found, ctx)
    proposals = ctx.student["proposals"]
    positive = torch.cat([p.gt_classes < K for p in proposals])
    assert torch.equal(found.logits, ctx.student["roi.cls"][positive][:, :K])


@pytest.mark.parametrize("student", ["SSD", "RetinaNet", "FCOS", "GFL", "GeneralizedRCNN", "C4"])
def test_gradients_of_boxes_and_logits(student):
    """Deltas and logits of the positives get one, nothing else does."""
    _, ctx, found = observed(student)
    two_stage = student in TWO_STAGE
    names = ("roi.cls[0]", "roi.box[0]") if two_stage else ("pred.cls", "pred.box")
    outputs = [ctx.student[name] for name in names]
    flat = outputs if two_stage else [level for output in outputs for level in output]
    grads = torch.autograd.grad(found.boxes.sum(), flat, retain_graph=True, allow_unused=True)
    number = 1 if two_stage else len(outputs[0])
    assert all(g is None or g.abs().sum() == 0 for g in grads[:number])
    moved = sum((g != 0).sum().item() for g in grads[number:] if g is not None)
    bins = 17 if student == "GFL" else 1
    # every positive has four numbers of its own; a relu or a distribution may leave some out
    assert 0.4 * len(found) * 4 * bins <= moved <= len(found) * 4 * bins
    grads = torch.autograd.grad(found.logits.sum(), flat, allow_unused=True)
    assert sum(g.sum().item() for g in grads[:number]) == found.logits.numel()
    assert all(g is None or g.abs().sum() == 0 for g in grads[number:])


@pytest.mark.parametrize("student", ["SSD", "RetinaNet", "GeneralizedRCNN", "Cascade", "C4"])
@pytest.mark.parametrize("num_gt", [(0, 0), (0, 3)])
def test_images_without_objects(student, num_gt):
    _, ctx, found = observed(student, num_gt=num_gt)
    assert found.counts[0] == 0 and (found.counts[1] > 0) == (num_gt[1] > 0)
    check_objects(found, ctx)
    assert found.boxes.requires_grad and found.logits.requires_grad
    assert found.boxes.shape[1:] == (4,) and found.logits.ndim == 2


# ------------------------------------------------------------------------------------- by itself
def instances(boxes, classes):
    return Instances(
        (50, 50), gt_boxes=Boxes(torch.tensor(boxes)), gt_classes=torch.tensor(classes)
    )


def test_index_looks_at_image_class_and_box():
    a, b = [1.0, 2, 9, 9], [3.0, 3, 20, 20]
    gt = [instances([a, a, b], [0, 1, 1]), instances([a], [1]), instances([b, a], [1, 1])]
    boxes = torch.tensor([a, a, b, a, a, b])
    labels, images = torch.tensor([0, 1, 1, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 2, 2])
    assert index_of_gt(boxes, labels, images, gt).tolist() == [0, 1, 2, 3, 5, 4]
    none = index_of_gt(boxes[:0], labels[:0], images[:0], [instances([a], [0])[:0]])
    assert none.shape == (0,) and none.dtype == torch.int64


def test_families_and_kinds_of_scores():
    found = {}
    for student in ("SSD", "RetinaNet", "GFL", "GeneralizedRCNN", "Cascade"):
        model = tiny_model(student)
        source = build_student_positives(build_tap(model).keys(model))
        found[student] = (type(source), source.scores, source.num_classes)
    dense, two_stage = DensePositives, TwoStagePositives
    assert found == {
        "SSD": (dense, "softmax", 3),
        "RetinaNet": (dense, "sigmoid", 3),
        "GFL": (dense, "sigmoid", 3),
        "GeneralizedRCNN": (two_stage, "softmax", 3),
        "Cascade": (two_stage, "softmax", 3),
    }


def test_students_that_are_refused():
    with pytest.raises(ValueError, match="RoI head .* or a dense one .*; this one has neck"):
        build_student_positives({"neck": KeyInfo(8, (8,))})
    keys = {"pred.cls": KeyInfo(9, (8,), (3,)), "pred.box": KeyInfo(12, (8,))}
    with pytest.raises(ValueError, match="whose tap lacks anchors, codec, assign; use e.g. SSD"):
        build_student_positives(keys)
