"""Tap of SSD: what each key means, a teacher run in stages, and methods that use it."""

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from kd_d2.distillation import DetectorTeacher, KDModel, build_distillers, build_tap
from kd_d2.distillation.ssd_tap import SSDTap
from tests.fixtures import teacher_of, tiny_batch, tiny_cfg, tiny_model

SQUARE = ((128, 128),)
STRIDES = (8, 16, 32, 64, 128)
MAPS = ("conv4_3", "conv7", "conv8_2", "conv9_2", "conv10_2")
WIDTHS = (32, 48, 32, 24, 24)
ANCHORS = (4, 6, 6, 4, 4)


def _batch(**kwargs):
    return tiny_batch(sizes=SQUARE, **kwargs)


@pytest.fixture(scope="module")
def observed():
    """Model, tap and observation of one training forward."""
    model = tiny_model("SSD")
    tap = build_tap(model)
    with EventStorage(), tap.observe(model, list(tap.keys(model))) as observation:
        model(_batch())
    observation.gt_instances = [x["instances"] for x in _batch()]
    return model, tap, observation


def test_keys(observed):
    model, tap, _ = observed
    assert type(tap) is SSDTap
    keys = tap.keys(model)
    trunk = {f"{group}.{name}" for group in ("backbone", "neck") for name in MAPS}
    assert set(keys) == trunk | {"neck", "pred.cls", "pred.box", "anchors", "codec", "assign"}
    for name, width, stride in zip(MAPS, WIDTHS, STRIDES):
        assert keys[f"neck.{name}"].channels == width and keys[f"neck.{name}"].strides == (stride,)
    assert keys["neck"].levels == list(zip(STRIDES, WIDTHS))
    assert keys["pred.cls"].channels == tuple(a * 4 for a in ANCHORS)
    assert keys["pred.cls"].signature == (4, "softmax")
    assert keys["pred.box"].levels == [(s, a * 4) for s, a in zip(STRIDES, ANCHORS)]
    assert keys["anchors"].signature[0] == ("offset", 0.5)
    assert [len(level) for level in keys["anchors"].signature[1:]] == list(ANCHORS)
    assert keys["codec"].signature[0] == "Box2BoxTransform"
    assert ("weights", (10.0, 10.0, 5.0, 5.0)) in keys["codec"].signature
    assert tap.anchor_strides(model) == list(STRIDES)


def test_values_are_those_of_the_model(observed):
    model, tap, seen = observed
    images = model.preprocess_image(_batch())
    maps = list(model.backbone(images.tensor).values())
    logits, deltas = model.head(maps)
    for key, expected in (("neck", maps), ("pred.cls", logits), ("pred.box", deltas)):
        assert len(seen[key]) == 5
        assert all(torch.equal(a, b) for a, b in zip(seen[key], expected)), key
        assert all(a.requires_grad for a in seen[key])
    assert torch.equal(seen["neck.conv9_2"], maps[3])
    anchors = model.anchor_generator(maps)
    assert torch.equal(Boxes.cat(seen["anchors"]).tensor, Boxes.cat(anchors).tensor)
    assert seen["codec"] is model.box2box_transform
    labels, boxes = model.label_anchors(anchors, seen.gt_instances)
    assignment = seen["assign"]
    assert torch.equal(assignment.labels, torch.stack(labels))
    assert torch.equal(assignment.boxes, torch.stack(boxes))
    assert assignment.num_classes == 3 and assignment.valid.all()
    assert 0 < assignment.positive.sum() < 100


def test_decoded_positives_are_boxes(observed):
    """The vocabulary suffices to decode what the student predicts for its positives."""
    model, _, seen = observed
    assignment, (image, row) = seen["assign"], seen["assign"].positive.nonzero(as_tuple=True)
    targets = model.box2box_transform.get_deltas(
        Boxes.cat(seen["anchors"]).tensor[row], assignment.boxes[image, row]
    )
    decoded = seen["codec"].apply_deltas(targets, Boxes.cat(seen["anchors"]).tensor[row])
    torch.testing.assert_close(decoded, assignment.boxes[image, row], rtol=1e-4, atol=1e-3)


def test_teacher_runs_in_stages_without_a_graph(observed):
    model, tap, seen = observed
    images = model.preprocess_image(_batch()).tensor
    calls = []
    hook = model.head.register_forward_hook(lambda *_: calls.append(1))
    run = tap.run(model, images, ["neck", "pred.cls"], seen.gt_instances)
    assert not calls
    assert torch.equal(run["neck"][0], seen["neck"][0]) and not run["neck"][0].requires_grad
    assert not calls
    assert torch.equal(run["pred.cls"][2], seen["pred.cls"][2]) and len(calls) == 1
    assert torch.equal(run["assign"].labels, seen["assign"].labels)
    hook.remove()


def test_no_towers(observed):
    model, tap, _ = observed
    with pytest.raises(ValueError, match="SSD has no dense head with towers"):
        tap.rest_of_head(model, "cls", 0, [])
    with pytest.raises(ValueError, match="SSD has no key 'head.cls"):
        tap.observe(model, ["head.cls[1]"])


# ------------------------------------------------------------------------ methods
def _kd_model(distillers, teacher=None, **overrides):
    student = tiny_model("SSD")
    teacher = teacher or teacher_of(tiny_model("SSD", seed=1), student_format="RGB")
    cfg = tiny_cfg("SSD", **{"KD.ENABLED": True, "KD.DISTILLERS": distillers, **overrides})
    built, schedules = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    return KDModel(student=student, distillers=built, teacher=teacher, schedules=schedules)


@pytest.mark.parametrize("method", ["FitNets", "PKD", "MGD", "SKD", "InsideGT", "MainRegion"])
def test_methods_on_the_pyramid(method):
    model = _kd_model((method,), **{"KD.MGD.WEIGHT": 1e-3, "KD.MGD.MASK_RATIO": 0.5})
    with EventStorage():
        losses = model(_batch())
    kd = [value for name, value in losses.items() if name.startswith("loss_kd/")]
    assert kd and all(torch.isfinite(x) and x > 0 for x in kd)
    sum(kd).backward()
    for name in ("features.0", "features.3", "extras.0.2"):
        weight = model.student.backbone.get_submodule(name).weight
        assert weight.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_fitnets_by_hand():
    """Mean squared difference per level, the student's behind its own 1x1 conv; widths differ."""
    wide = {
        "MODEL.SSD_VGG.CHANNELS": (8, 16, 24, 40, 32),
        "MODEL.SSD_VGG.EXTRAS": ((16, 20, 3, 2, 1), (16, 24, 3, 2, 1), (16, 28, 3, 2, 1)),
    }
    teacher = teacher_of(tiny_model("SSD", seed=1, **wide), student_format="RGB")
    model = _kd_model(("FitNets",), teacher)
    assert isinstance(teacher, DetectorTeacher)
    with EventStorage():
        losses = model(_batch())
    adapters = model.distillers["fitnets"].pair_terms["feat"].adapter.layers
    shapes = [tuple(conv.weight.shape[:2]) for conv in adapters]
    assert shapes == [(40, 32), (48, 48), (20, 32), (24, 24), (28, 24)]
    with torch.no_grad():
        images = model.student.preprocess_image(_batch()).tensor
        ours = list(model.student.backbone(images).values())
        theirs = list(teacher.model.backbone(images).values())
        expected = sum(
            ((conv(a) - b) ** 2).mean() for conv, a, b in zip(adapters, ours, theirs, strict=True)
        )
    torch.testing.assert_close(losses["loss_kd/fitnets/feat"].detach(), expected)


def test_pkd_refuses_other_widths():
    other = tiny_model("SSD", **{"MODEL.SSD_VGG.CHANNELS": (8, 16, 24, 40, 32)})
    with pytest.raises(ValueError, match=r"channels differ: student \(32, 48, 32, 24, 24\)"):
        _kd_model(("PKD",), teacher_of(other, student_format="RGB"))


@pytest.mark.parametrize("method", ["Mimic", "RankMimic", "GID", "PFI", "FRS"])
def test_methods_of_sigmoid_scores_are_refused(method):
    overrides = {"KD.FRS.FEAT_WEIGHT": 1.0, "KD.FRS.CLS_WEIGHT": 1.0}
    with pytest.raises(ValueError, match="softmax .*feature maps"):
        _kd_model((method,), **overrides)


@pytest.mark.parametrize("method, message", [("CrossKD", "CrossKD"), ("LD", "no values for .*SSD")])
def test_methods_of_other_heads_are_refused(method, message):
    with pytest.raises(ValueError, match=message):
        _kd_model((method,))


def test_student_step_is_that_of_plain_training():
    """Its own losses and, with KD losses taken away, its gradients."""
    model = _kd_model(("PKD",))
    plain = tiny_model("SSD")
    with EventStorage():
        losses, own = model(_batch()), plain(_batch())
    assert {k for k in losses if not k.startswith("loss_kd")} == set(own)
    for name, value in own.items():
        assert torch.equal(losses[name], value)
    sum(v for k, v in losses.items() if not k.startswith("loss_kd")).backward()
    sum(own.values()).backward()
    for (name, a), b in zip(model.student.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    assert model.student.state_dict().keys() == plain.state_dict().keys()
