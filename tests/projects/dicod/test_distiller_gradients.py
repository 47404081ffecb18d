"""DICOD's gradients: where they arrive and end, finite differences, none without weight."""

import pytest
import torch
from torch.nn import functional as F

from kd_d2.engine.resume import settle_scripted_losses
from tests.fixtures import DENSE, TWO_STAGE, tiny_batch, tiny_cfg, tiny_model
from tests.projects.dicod.detectors import (
    TERMS,
    batch_for,
    classifier,
    classifier_teacher,
    context_of,
    detector,
    gradients,
    kd,
    only,
    prefix,
    step,
)

STUDENTS = ("SSD", "RetinaNet", "GeneralizedRCNN")
ALL_STUDENTS = ("SSD", *DENSE, *TWO_STAGE)
every_kind = pytest.mark.parametrize("student", STUDENTS)


# ------------------------------------------------------------------------------------- gradients
@every_kind
@pytest.mark.parametrize("term", TERMS)
def test_where_the_gradient_of_a_term_arrives(student, term):
    model = detector(student, **only(term))
    losses, _ = step(model, batch_for(student))
    losses[prefix(term)].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    ends = {"cls_score"} if term == "cls" else {"bbox_pred"}
    heads = {n.split(".")[-3 if student == "SSD" else -2] for n in reached}
    assert heads & {"cls_score", "bbox_pred"} == ends
    assert any(".backbone." in name for name in reached)
    assert not any("proposal_generator" in name for name in reached)
    if student == "RetinaNet":
        tower = {"cls": "cls_subnet", "loc_obj": "bbox_subnet", "loc_feat": "bbox_subnet"}[term]
        assert {n.split(".")[2] for n in reached if "_subnet" in n} == {tower}
    assert all(p.grad is None for p in model.teacher.model.parameters())


QR = {
    # every layer of the backbone a quarter as wide
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.ROI_HEADS.NUM_CLASSES": 10,
}


def test_quartered_resnet_and_the_rows_of_two_classes():
    """Objects of classes 3 and 7: of the box regression by class, their rows alone learn."""
    names = [f"class {i}" for i in range(10)]
    cfg_keys = only("loc_obj", "loc_feat")
    model = detector(
        "GeneralizedRCNN",
        model_keys=QR,
        teacher=classifier_teacher(tiny_cfg("GeneralizedRCNN", **QR), classes=names),
        **cfg_keys,
    )
    batch = tiny_batch(num_gt=(1, 1), num_classes=10)
    for x, label in zip(batch, (3, 7)):
        x["instances"].gt_classes[:] = label
    with torch.no_grad():  # boxes near the proposals, of which none leaves the image
        model.student.roi_heads.box_predictor.bbox_pred.weight.mul_(1e-3)
    losses, _ = step(model, batch)
    assert set(kd(losses)) == {prefix("loc_obj"), prefix("loc_feat")}
    sum(kd(losses).values()).backward()
    rows = model.student.roi_heads.box_predictor.bbox_pred.weight.grad.view(10, 4, -1)
    reached = rows.abs().sum(dim=(1, 2)).nonzero().flatten().tolist()
    assert reached == [3, 7]
    assert model.student.roi_heads.box_predictor.cls_score.weight.grad is None
    assert model.student.backbone.fpn_lateral3.weight.grad.abs().sum() > 0
    assert model.student.backbone.bottom_up.res2[0].conv1.weight.grad.abs().sum() > 0
    rpn = model.student.proposal_generator.parameters()
    assert all(p.grad is None or not p.grad.any() for p in rpn)


def test_targets_follow_the_class_of_each_proposal():
    """The classifier's logits of a foreground proposal are those of its object's crop."""
    model = detector("GeneralizedRCNN", **only("cls"))
    batch = batch_for("GeneralizedRCNN", num_gt=(4, 3))
    ctx = context_of(model, batch)
    found = model.distillers["dicod"].positives(ctx)
    # a classifier that knows the objects by their number: object k has the logits (k, 0, 0)
    model.teacher.logits = lambda crops: F.pad(torch.arange(len(crops)).float()[:, None], (0, 2))
    given = []
    mode = model.distillers["dicod"].mode
    model.distillers["dicod"].mode = lambda s, t: given.append(t) or mode(s, t)
    step(model, batch)
    numbers = given[0][:, 0].long()
    classes = torch.cat([x["instances"].gt_classes for x in batch])
    proposals = ctx.student["proposals"]
    labels = torch.cat([p.gt_classes[p.gt_classes < 3] for p in proposals])
    assert torch.equal(classes[numbers], labels) and torch.equal(numbers, found.gt_index)
    assert len(set(numbers.tolist())) == 7


@pytest.mark.parametrize("student", ["SSD", "RetinaNet"])
def test_gradient_of_a_delta_is_that_of_finite_differences(student):
    """Through decoding, crop and stem: one bias of the box regression, in double precision."""
    model = detector(student, **only("loc_obj", "loc_feat")).double()
    model.teacher = classifier_teacher(tiny_cfg(student), model=classifier().double())
    for name in ("_scale", "_shift"):
        setattr(model.teacher, name, getattr(model.teacher, name).double())
    heads = [m for n, m in model.student.named_modules() if "bbox_pred" in n and hasattr(m, "bias")]
    bias = heads[-1 if student != "SSD" else 1].bias
    batch = batch_for(student)

    def value():
        return sum(kd(step(model, batch)[0]).values())

    (gradient,) = torch.autograd.grad(value(), bias)
    k = gradient.abs().argmax()
    change = 1e-4
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            bias[k] += sign * change
            with torch.enable_grad():
                values.append(value().item())
            bias[k] -= sign * change
    assert abs(gradient[k]) > 1e-3
    # boxes are fp32: Detectron2's codec casts them
    assert gradient[k].item() == pytest.approx((values[0] - values[1]) / 2e-4, rel=0.05)


@pytest.mark.parametrize(
    "student, how",
    [*((student, "weights") for student in STUDENTS), ("SSD", "schedule")],
)
def test_without_weight_the_student_trains_plainly(student, how):
    keys = {"KD.DICOD.SCHEDULE.START_ITER": 5, "SOLVER.MAX_ITER": 9} if how == "schedule" else {}
    model, batch = detector(student, **keys), batch_for(student)
    distiller = model.distillers["dicod"]
    if how == "weights":
        distiller.weights = dict.fromkeys(distiller.weights, 0.0)
    else:
        model.teacher.logits = model.teacher.features = None
    plain = tiny_model(student, seed=1)
    settle_scripted_losses(plain)
    expected, _ = step(plain, batch)
    sum(expected.values()).backward()
    losses, _ = step(model, batch)
    sum(losses.values()).backward()
    assert list(kd(losses).values()) == [0.0] * 3
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name
    found = gradients(model.student)
    for name, gradient in gradients(plain).items():
        assert torch.equal(found[name], gradient), name
