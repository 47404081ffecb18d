"""DICOD on whole detectors: values of a naive loop, gradients, empty batches, both networks."""

import copy

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou
from torch.nn import functional as F

from kd_d2.projects.dicod.kd_cls import CLS_MODES
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


# -------------------------------------------------------------------------------------- modes
@pytest.mark.parametrize(
    "student, mode, expected",
    [
        ("SSD", "auto", "SoftmaxKL"),
        ("GeneralizedRCNN", "auto", "SoftmaxKL"),
        ("SSD", "ForegroundSoftmaxKL", "ForegroundSoftmaxKL"),
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
