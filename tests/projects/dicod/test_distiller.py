"""DICOD on whole detectors: values of a naive loop, gradients, empty batches, both networks."""

import copy
import logging

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou
from torch.nn import functional as F

from kd_d2.engine.resume import settle_scripted_losses
from kd_d2.projects.dicod.kd_cls import CLS_MODES
from kd_d2.projects.dicod.teacher_check import TeacherCheck
from tests.fixtures import DENSE, TWO_STAGE, tiny_batch, tiny_model
from tests.projects.dicod.detectors import (
    TERMS,
    batch_for,
    classifier,
    classifier_teacher,
    context_of,
    detector,
    gradients,
    only,
    prefix,
    step,
)

STUDENTS = ("SSD", "RetinaNet", "GeneralizedRCNN")
ALL_STUDENTS = ("SSD", *DENSE, *TWO_STAGE)
every_kind = pytest.mark.parametrize("student", STUDENTS)


def kd(losses):
    return {k: v for k, v in losses.items() if k.startswith("loss_kd/")}


# --------------------------------------------------------------------------------- every student
@pytest.mark.parametrize("student", ALL_STUDENTS)
def test_every_student(student):
    model = detector(student)
    before = copy.deepcopy(model.teacher.model.state_dict())
    losses, storage = step(model, batch_for(student))
    assert tuple(kd(losses)) == tuple(prefix(term) for term in TERMS)
    for value in kd(losses).values():
        assert value > 0 and torch.isfinite(value) and value.dtype == torch.float32
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
    theirs = model.teacher.model
    assert not any(m.training for m in theirs.modules())
    assert all(p.grad is None for p in theirs.parameters())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, before[name]), name
    inside = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not inside & {id(t) for t in theirs.state_dict(keep_vars=True).values()}
    assert not list(model.distillers.parameters()) and not model.distillers.state_dict()
    scalars = ("num_pos", "teacher_top1_on_gt", "mean_iou_pred_gt")
    assert {f"dicod/{name}" for name in scalars} <= set(storage.latest())


# -------------------------------------------------------------------------------- a naive loop
def crop(image, box, size):
    """Equation 8 with torch's affine_grid; the box lies inside of an image without padding."""
    height, width = image.shape[1:]
    x1, y1, x2, y2 = box
    zero = torch.zeros_like(x1)
    theta = torch.stack(
        [(x2 - x1) / width, zero, (x1 + x2) / width - 1]
        + [zero, (y2 - y1) / height, (y1 + y2) / height - 1]
    )
    grid = F.affine_grid(theta.view(1, 2, 3), [1, 3, size, size], align_corners=False)
    return F.grid_sample(image[None], grid, align_corners=False)


def naive(model, ctx, size, pools, temperature, weights):
    """Object by object, positive by positive, from the classifier's own modules."""
    net, distiller = model.teacher.model, model.distillers["dicod"]
    positives = distiller.positives(ctx)
    student = model.student
    images = student.preprocess_image(ctx.batched_inputs).tensor
    # from the student's pixels to the classifier's
    raw = images * student.pixel_std + student.pixel_mean
    raw = raw.flip(1) if getattr(student, "input_format", "BGR") != "RGB" else raw
    theirs = (raw - net.pixel_mean) / net.pixel_std

    def stem(x):
        return net.maxpool(net.relu(net.bn1(net.conv1(x))))

    def logits(x):
        x = net.layer4(net.layer3(net.layer2(net.layer1(stem(x)))))
        return net.fc(x.mean(dim=(2, 3)))

    def views(i, box):
        result = {"obj": crop(images[i], box, size)}
        result["stem"] = stem(crop(theirs[i], box, size))
        result["layer1"] = net.layer1(result["stem"])
        return {v: F.adaptive_avg_pool2d(result[v], m) for v, m in pools.items()}

    sums, k, divisor = dict.fromkeys(("cls", *pools), 0.0), 0, 0
    limits = [torch.tensor([w, h, w, h]) for h, w in ctx.image_sizes]
    for i, count in enumerate(positives.counts):
        divisor += max(count, 1)
        for _ in range(count):
            gt = positives.gt_boxes[k].clamp(min=0).minimum(limits[i])
            box = positives.boxes[k].clamp(min=0).minimum(limits[i])
            target = logits(crop(theirs[i], gt, model.teacher.input_size))[0] / temperature
            own = positives.logits[k] / temperature
            if distiller.positives.scores == "softmax":
                p, log_own = target.softmax(0), own.log_softmax(0)[:-1]
                value = (p * (target.log_softmax(0) - log_own)).sum()
            else:
                p, q = target.sigmoid(), own.sigmoid()
                value = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
            sums["cls"] += temperature**2 * value
            a, b = views(i, box), views(i, gt)
            for v in pools:
                sums[v] += (a[v] - b[v]).abs().mean()
            k += 1
    layers = [v for v in pools if v != "obj"]
    return {
        prefix("cls"): weights[0] * sums["cls"] / divisor,
        prefix("loc_obj"): weights[1] * sums["obj"] / k,
        prefix("loc_feat"): weights[2] * sum(sums[v] for v in layers) / k / len(layers),
    }


CHANGED = {
    "KD.DICOD.CLS.WEIGHT": 0.7,
    "KD.DICOD.CLS.T": 3.0,
    "KD.DICOD.LOC.OBJ_WEIGHT": 0.5,
    "KD.DICOD.LOC.FEAT_WEIGHT": 2.0,
    "KD.DICOD.LOC.SAMPLE_SIZE": 40,
    "KD.DICOD.LOC.OBJ_POOL": 5,
    "KD.DICOD.LOC.FEAT_LAYERS": ["stem", "layer1"],
    "KD.DICOD.LOC.FEAT_POOLS": [6, 10],
    "KD.DICOD.LOC.CHUNK": 7,
}


@pytest.mark.parametrize(
    "student, keys",
    [
        ("SSD", "defaults"),
        ("SSD", "changed"),
        ("RetinaNet", "changed"),
        ("GeneralizedRCNN", "defaults"),
        ("Cascade", "changed"),
    ],
)
def test_values_of_a_naive_loop(student, keys):
    changed = keys == "changed"
    model = detector(student, **(CHANGED if changed else {}))
    if changed:
        pools = {"obj": 5, "stem": 6, "layer1": 10}
        arguments = (40, pools, 3.0, (0.7, 0.5, 2.0))
    else:
        arguments = (32, {"obj": 4, "stem": 8}, 2.0, (0.4, 0.15, 0.15))
    # one size, so that the whole tensor is image; the last image has no objects
    batch = tiny_batch(3, sizes=((128, 128),), num_gt=(3, 2, 0))
    losses, _ = step(model, batch)
    ctx = context_of(model, batch)
    expected = naive(model, ctx, *arguments)
    for name, value in expected.items():
        # the published crops err by as much: 5e-3 of pixels whose std is 50
        torch.testing.assert_close(losses[name], value, rtol=2e-3, atol=1e-4, msg=name)
    counts = model.distillers["dicod"].positives(ctx).counts
    assert counts[2] == 0 and min(counts[:2]) > 0


@pytest.mark.parametrize("student", ["RetinaNet", "GeneralizedRCNN"])
def test_what_is_logged(student):
    model = detector(student)
    batch = batch_for(student, num_gt=(4, 3))
    _, storage = step(model, batch)
    latest = {k: v for k, (v, _) in storage.latest().items()}
    ctx = context_of(model, batch)
    found = model.distillers["dicod"].positives(ctx)
    assert latest["dicod/num_pos"] == len(found) / 2
    ious = [
        pairwise_iou(Boxes(a[None]), Boxes(b[None])).item()
        for a, b in zip(found.boxes.detach(), found.gt_boxes)
    ]
    assert latest["dicod/mean_iou_pred_gt"] == pytest.approx(sum(ious) / len(ious), abs=1e-4)
    right = 0
    for i, x in enumerate(ctx.gt_instances):
        for box, label in zip(x.gt_boxes.tensor, x.gt_classes.tolist()):
            y1, x1, y2, x2 = box[1], box[0], box[3], box[2]
            size, image_size = model.teacher.input_size, ctx.image_sizes[i]
            image = ctx.images[i, :, : image_size[0], : image_size[1]]
            crops = crop(image, torch.stack([x1, y1, x2, y2]), size)
            right += model.teacher.logits(crops).argmax().item() == label
    assert latest["dicod/teacher_top1_on_gt"] == pytest.approx(100 * right / 7)
    for term in TERMS:
        assert latest[f"kd_raw/dicod/{term}"] > 0


# ---------------------------------------------------------------------------------- the teacher
@pytest.mark.parametrize("student", ["SSD", "GeneralizedRCNN"])
def test_the_classifier_sees_every_object_once(student, monkeypatch):
    """Crops of objects are made once a step and size; as many predicted boxes as positives."""
    model = detector(student)
    calls = {"logits": [], "features": []}
    for name in calls:
        original = getattr(model.teacher, name)

        def spy(crops, *args, name=name, original=original):
            calls[name].append((tuple(crops.shape), crops.requires_grad, crops.data_ptr()))
            return original(crops, *args)

        monkeypatch.setattr(model.teacher, name, spy)
    _, storage = step(model, batch_for(student))
    positives = round(2 * storage.latest()["dicod/num_pos"][0])
    ((shape, has_graph, where),) = calls["logits"]
    assert shape == (5, 3, 32, 32) and not has_graph
    targets, predicted = calls["features"]
    # the very crops that were classified
    assert targets == (shape, False, where)
    assert predicted[:2] == ((positives, 3, 32, 32), True)


def test_crops_for_the_classes_have_the_classifiers_size():
    model = detector("SSD", **{"KD.DICOD.LOC.SAMPLE_SIZE": 48})
    sizes = []
    original = model.teacher.logits
    model.teacher.logits = lambda crops: sizes.append(crops.shape) or original(crops)
    losses, _ = step(model, batch_for("SSD"))
    assert sizes == [(5, 3, 32, 32)] and losses[prefix("loc_feat")] > 0


@pytest.mark.parametrize("student", ["SSD", "GeneralizedRCNN"])
def test_pixels_alone_need_no_teacher(student):
    alone = detector(student, teacher=None, **only("loc_obj"))
    distiller = alone.distillers["dicod"]
    assert not distiller.needs_teacher and not distiller.teacher_needs
    losses, storage = step(alone, batch_for(student))
    whole, _ = step(detector(student), batch_for(student))
    assert set(kd(losses)) == {prefix("loc_obj")}
    torch.testing.assert_close(losses[prefix("loc_obj")], whole[prefix("loc_obj")])
    assert "dicod/teacher_top1_on_gt" not in storage.latest()
    for term in ("cls", "loc_feat"):
        assert detector(student, **only(term)).distillers["dicod"].needs_teacher
    with pytest.raises(ValueError, match="set it to 'ClassifierTeacher'"):
        detector(student, teacher=None)


@pytest.mark.parametrize("term", TERMS)
def test_terms_alone_are_those_of_all_together(term):
    model = detector("SSD", **only(term))
    losses, _ = step(model, batch_for("SSD"))
    together, _ = step(detector("SSD"), batch_for("SSD"))
    assert tuple(kd(losses)) == (prefix(term),)
    torch.testing.assert_close(losses[prefix(term)], together[prefix(term)])


def test_two_step_normalisation_is_the_native_one():
    """A BGR student and an RGB one that see the same pixels give the same classifier losses."""
    values = []
    for order in ("BGR", "RGB"):
        mean, std = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]
        if order == "RGB":
            mean, std = mean[::-1], std[::-1]
        keys = {"INPUT.FORMAT": order, "MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}
        model, batch = detector("RetinaNet", model_keys=keys), batch_for("RetinaNet")
        if order == "RGB":
            for x in batch:
                x["image"] = x["image"].flip(0)
        ctx = context_of(model, batch)
        crops = ctx.images[:, :, 20:52, 10:42]
        values.append(model.teacher.logits(crops))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


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
        teacher=classifier_teacher(_cfg_of(QR), classes=names),
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
    model.teacher = classifier_teacher(_cfg_of({}, student), model=classifier().double())
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


def _cfg_of(keys, student="GeneralizedRCNN"):
    from tests.fixtures import tiny_cfg

    return tiny_cfg(student, **keys)


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


# -------------------------------------------------------------------------------------- modes
@pytest.mark.parametrize(
    "student, mode, expected",
    [
        ("SSD", "auto", "SoftmaxKL"),
        ("GeneralizedRCNN", "auto", "SoftmaxKL"),
        ("RetinaNet", "auto", "BinaryKL"),
        ("RetinaNet", "SigmoidL1KL", "SigmoidL1KL"),
    ],
)
def test_mode_of_the_student(student, mode, expected):
    model = detector(student, **{"KD.DICOD.CLS.MODE": mode, "KD.DICOD.CLS.T": 1.5})
    found = model.distillers["dicod"].mode
    assert type(found) is CLS_MODES.get(expected) and found.temperature == 1.5
    losses, _ = step(model, batch_for(student))
    assert losses[prefix("cls")] > 0
