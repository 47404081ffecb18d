"""The detector as a whole."""

import copy
import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou

from kd_d2.distillation import build_tap
from kd_d2.export import export_student
from kd_d2.projects.mimicdet.diagnostics import Diagnostics
from tests.fixtures import CLASSES, save_weights, tiny_batch
from tests.projects.mimicdet.whole import (
    WITHOUT_P2,
    losses_of,
    mimicdet_cfg,
    mimicdet_model,
    storage,
)

REFINE = {"loss_refine_cls", "loss_refine_reg"}
S_HEAD = {"loss_s_cls", "loss_s_reg"}
T_HEAD = {"loss_t_cls", "loss_t_reg"}
MIMIC = {"loss_mimic_cls", "loss_mimic_reg"}
MIMIC_OFF = {"MODEL.MIMICDET.MIMIC.WEIGHT": 0.0}
T_HEAD_OFF = {**MIMIC_OFF, **WITHOUT_P2, "MODEL.MIMICDET.T_HEAD.ENABLED": False}
P3_TO_P7 = ["p3", "p4", "p5", "p6", "p7"]

# settings and the losses that they leave
ABLATIONS = {
    "full": ({}, REFINE | S_HEAD | T_HEAD | MIMIC),
    "without_t_head": (T_HEAD_OFF, REFINE | S_HEAD),
    "without_mimic": (MIMIC_OFF, REFINE | S_HEAD | T_HEAD),
    "only_t_head": (
        {
            **MIMIC_OFF,
            "MODEL.MIMICDET.S_HEAD.ENABLED": False,
            "MODEL.MIMICDET.EVAL_HEAD": "teacher",
        },
        REFINE | T_HEAD,
    ),
    "conv": ({"MODEL.MIMICDET.S_HEAD.ALIGN": "conv"}, REFINE | S_HEAD | T_HEAD | MIMIC),
    "deform": ({"MODEL.MIMICDET.S_HEAD.ALIGN": "deform"}, REFINE | S_HEAD | T_HEAD | MIMIC),
    "roiconv": ({"MODEL.MIMICDET.S_HEAD.ALIGN": "roiconv"}, REFINE | S_HEAD | T_HEAD | MIMIC),
    "guided_5": ({"MODEL.MIMICDET.S_HEAD.KERNELS": [5] * 5}, REFINE | S_HEAD | T_HEAD | MIMIC),
    "light": (
        {"MODEL.MIMICDET.T_HEAD.VARIANT": "light"},
        REFINE | S_HEAD | T_HEAD | {"loss_mimic_feature"},
    ),
    "heavy": (
        {"MODEL.MIMICDET.T_HEAD.VARIANT": "heavy"},
        REFINE | S_HEAD | T_HEAD | {"loss_mimic_feature"},
    ),
    "plain_pyramid": (
        {**WITHOUT_P2, "MODEL.ROI_HEADS.IN_FEATURES": P3_TO_P7},
        REFINE | S_HEAD | T_HEAD | MIMIC,
    ),
    "dense": ({"MODEL.MIMICDET.S_HEAD.GATHER_FIRST": False}, REFINE | S_HEAD | T_HEAD | MIMIC),
    "feature_target": (
        {"MODEL.MIMICDET.MIMIC.CLS_TARGET": "feature"},
        REFINE | S_HEAD | T_HEAD | MIMIC,
    ),
}


def gradients(model, losses, names):
    model.zero_grad()
    sum(losses[name] for name in names).backward(retain_graph=True)
    return {
        name: 0.0 if p.grad is None else p.grad.abs().sum().item()
        for name, p in model.named_parameters()
    }


def total(norms, prefix):
    found = [value for name, value in norms.items() if name.startswith(prefix)]
    assert found, prefix
    return sum(found)


@torch.no_grad()
def detections(model, batch):
    return [x["instances"] for x in model.eval()(batch)]


def assert_same(ours, theirs, atol=0.0):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert len(a) == len(b) > 0 and a.image_size == b.image_size
        assert torch.allclose(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=100 * atol, rtol=0)
        assert torch.allclose(a.scores, b.scores, atol=atol, rtol=0)
        assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize("name", ABLATIONS)
def test_two_steps_of_every_switch(name):
    """The losses are those of the switch, finite, and all trainable parameters get a gradient."""
    overrides, expected = ABLATIONS[name]
    model = mimicdet_model(**overrides)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    for step in range(2):
        losses, _ = losses_of(model, tiny_batch(seed=step), seed=step)
        assert set(losses) == expected
        assert all(torch.isfinite(x) and x >= 0 for x in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"backbone", "refinement"} <= moved
    assert ("head" in moved) == ("loss_s_cls" in expected)
    assert ("t_head" in moved) == ("loss_t_cls" in expected)
    assert len(detections(model, tiny_batch())) == 2


@pytest.mark.parametrize("num_gt", [0, (0, 2)])
def test_images_without_ground_truth(num_gt):
    model = mimicdet_model()
    losses, scalars = losses_of(model, tiny_batch(num_gt=num_gt))
    assert all(torch.isfinite(x) for x in losses.values())
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if num_gt == 0:
        assert losses["loss_refine_reg"] == losses["loss_s_reg"] == losses["loss_t_reg"] == 0
        assert scalars["mimicdet/num_fg_samples"] == 0


def test_no_positive_box():
    """At first adjusted boxes may overlap no object by 0.6: regression is 0, all else trains."""
    model = mimicdet_model(**{"MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.999]})
    losses, scalars = losses_of(model, tiny_batch())
    assert scalars["mimicdet/num_fg_samples"] == 0 and scalars["mimicdet/num_refine_positives"] > 0
    assert losses["loss_s_reg"] == losses["loss_t_reg"] == 0 < losses["loss_mimic_cls"]
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_odd_sizes():
    """Boxes stay inside of images whose sides are no multiples of anything; a tiny one works."""
    batch = tiny_batch(3, sizes=((97, 131), (33, 65), (63, 41)), num_gt=1)
    model = mimicdet_model()
    losses, _ = losses_of(model, batch)
    assert all(torch.isfinite(x) for x in losses.values())
    for found, inputs in zip(detections(model, batch), batch):
        assert found.image_size == (inputs["height"], inputs["width"])
        boxes = found.pred_boxes.tensor
        assert len(boxes) and (boxes >= 0).all()
        assert (boxes[:, 2] <= inputs["width"]).all() and (boxes[:, 3] <= inputs["height"]).all()


def test_detections_are_scaled_to_the_size_of_the_input():
    model, batch = mimicdet_model(), tiny_batch()
    small = detections(model, batch)
    for inputs in batch:
        inputs["height"], inputs["width"] = 2 * inputs["height"], 3 * inputs["width"]
    large = detections(model, batch)
    for a, b in zip(small, large):
        scaled = a.pred_boxes.tensor * torch.tensor([3.0, 2.0, 3.0, 2.0])
        assert torch.allclose(scaled, b.pred_boxes.tensor, atol=1e-3)


class Touched(Exception):
    pass


def touch(module, *_):
    raise Touched


def test_inference_runs_neither_t_head_nor_finest_level():
    """Oracle 10: with hooks that raise, the student detects and the teacher does not."""
    student = mimicdet_model()
    teacher = mimicdet_model(**{"MODEL.MIMICDET.EVAL_HEAD": "teacher"})
    expected = detections(student, tiny_batch())
    for model in (student, teacher):
        model.backbone.fpn_lateral2.register_forward_hook(touch)
        model.backbone.fpn_output2.register_forward_hook(touch)
        model.t_head.pooler.register_forward_hook(touch)
    assert_same(detections(student, tiny_batch()), expected)
    with pytest.raises(Touched):
        detections(teacher, tiny_batch())
    with pytest.raises(Touched):
        losses_of(student.train(), tiny_batch())


def test_both_heads_detect_on_the_same_boxes():
    """EVAL_HEAD changes the head; thresholds and adjusted boxes stay."""
    student = mimicdet_model()
    teacher = mimicdet_model(**{"MODEL.MIMICDET.EVAL_HEAD": "teacher"})
    teacher.load_state_dict(student.state_dict())
    batch = tiny_batch()
    outputs = {}
    for name, model in (("student", student), ("teacher", teacher)):
        images = model.eval().preprocess_image(batch)
        with torch.no_grad():
            features = model.pyramid(images.tensor, name == "teacher")
            outputs[name] = model.refinement(images, features).proposals
    for a, b in zip(outputs["student"], outputs["teacher"]):
        assert torch.equal(a.anchor_index, b.anchor_index)
        assert torch.equal(a.proposal_boxes.tensor, b.proposal_boxes.tensor)
    found = detections(teacher, batch)
    assert all((x.scores > 0.005).all() and 0 < len(x) <= 100 for x in found)
    with pytest.raises(AssertionError):
        assert_same(found, detections(student, batch))


def test_detections_by_hand():
    """The S-head path against its definition, one image, box by box."""
    model = mimicdet_model().eval()
    batch = tiny_batch(1)
    (found,) = detections(model, batch)
    images = model.preprocess_image(batch)
    with torch.no_grad():
        features = model.backbone(images.tensor)
        refined = model.refinement(images, features)
        (boxes,) = refined.proposals
        levels = [features[name] for name in model.head_in_features]
        aligned = model.s_head(levels, refined.deltas)
        candidates = []
        starts = [0]
        for level in levels:
            starts.append(starts[-1] + level.shape[-2] * level.shape[-1])
        for box, cell, level in zip(boxes.proposal_boxes.tensor, boxes.anchor_index, boxes.level):
            y, x = divmod(int(cell) - starts[level], levels[level].shape[-1])
            vector = aligned[level][:1, :, y : y + 1, x : x + 1]
            cls_feature, reg_feature = (p(vector).relu() for p in model.s_head.projections)
            scores = model.s_head.cls_score(cls_feature).flatten().softmax(0)[:-1]
            dx, dy, dw, dh = model.s_head.bbox_pred(reg_feature).flatten().tolist()
            w, h = box[2] - box[0], box[3] - box[1]
            cx, cy = box[0] + w / 2 + dx / 10 * w, box[1] + h / 2 + dy / 10 * h
            w, h = w * torch.tensor(dw / 5).exp(), h * torch.tensor(dh / 5).exp()
            corners = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)).clamp(0, 128)
            candidates += [(float(s), k, corners) for k, s in enumerate(scores) if s > 0.005]
    candidates.sort(key=lambda x: -x[0])
    corners = Boxes(torch.stack([c for _, _, c in candidates]))
    overlaps = (pairwise_iou(corners, corners) > 0.6).tolist()
    indices = []
    for i, (_, label, _) in enumerate(candidates):
        if not any(overlaps[i][j] and candidates[j][1] == label for j in indices):
            indices.append(i)
    kept = [candidates[i] for i in indices]
    kept = kept[:100]
    assert len(kept) == len(found) > 10
    assert torch.allclose(found.scores, torch.tensor([s for s, _, _ in kept]), atol=1e-5)
    assert found.pred_classes.tolist() == [k for _, k, _ in kept]
    hand = torch.stack([c for _, _, c in kept])
    assert torch.allclose(found.pred_boxes.tensor, hand, atol=1e-3)


def test_gather_first_equals_dense():
    """Oracle 11, losses and detections."""
    sparse = mimicdet_model()
    dense = mimicdet_model(**{"MODEL.MIMICDET.S_HEAD.GATHER_FIRST": False})
    ours, _ = losses_of(sparse, tiny_batch())
    theirs, _ = losses_of(dense, tiny_batch())
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6), name
    assert_same(detections(sparse, tiny_batch()), detections(dense, tiny_batch()), atol=1e-5)


def test_gradients_of_the_mimic_loss():
    """Oracle 12: into micro-networks, projections and FPN; not into T-head or refinement."""
    model = mimicdet_model()
    losses, _ = losses_of(model, tiny_batch())
    norms = gradients(model, losses, MIMIC)
    assert total(norms, "t_head.") == total(norms, "refinement.") == 0
    assert total(norms, "head.align.3.micro_network") > 0
    assert total(norms, "head.align.5.micro_network") > 0
    assert total(norms, "head.projections.0") > 0 and total(norms, "head.projections.1") > 0
    assert total(norms, "head.cls_score") > 0 and total(norms, "head.bbox_pred") == 0
    assert total(norms, "backbone.fpn_lateral3") > 0
    # P2 is the teacher's alone
    assert total(norms, "backbone.fpn_output2") == total(norms, "backbone.fpn_lateral2") == 0

    follow = mimicdet_model(**{"MODEL.MIMICDET.MIMIC.DETACH_TEACHER": False})
    losses, _ = losses_of(follow, tiny_batch())
    norms = gradients(follow, losses, MIMIC)
    assert total(norms, "t_head.") > 0 and total(norms, "backbone.fpn_output2") > 0


def test_gradients_of_the_other_losses():
    model = mimicdet_model()
    losses, _ = losses_of(model, tiny_batch())
    norms = gradients(model, losses, S_HEAD)
    assert total(norms, "refinement.") == total(norms, "t_head.") == 0
    assert total(norms, "head.") > 0 and total(norms, "backbone.") > 0
    norms = gradients(model, losses, T_HEAD)
    assert total(norms, "refinement.") == total(norms, "head.") == 0
    assert total(norms, "t_head.") > 0 and total(norms, "backbone.fpn_output2") > 0
    norms = gradients(model, losses, REFINE)
    assert total(norms, "t_head.") == total(norms, "head.") == 0
    assert total(norms, "refinement.") > 0 and total(norms, "backbone.") > 0

    through = mimicdet_model(**{"MODEL.MIMICDET.S_HEAD.DETACH_DELTAS": False})
    losses, _ = losses_of(through, tiny_batch())
    norms = gradients(through, losses, S_HEAD)
    assert total(norms, "refinement.rpn_head.anchor_deltas") > 0


def test_mimic_losses_by_hand():
    """Eq. 1 on the boxes of the T-head: cosines of logits and of rectified features, box by box."""
    model, seen = mimicdet_model(), []
    model.sampler.register_forward_hook(lambda module, args, out: seen.append(out))
    losses, _ = losses_of(model, tiny_batch())
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(tiny_batch()).tensor)
        levels = [features[name] for name in P3_TO_P7]
        _, deltas = model.refinement.rpn_head(levels)
        aligned = model.s_head(levels, deltas)
        cls, reg, count = 0.0, 0.0, 0
        for image, boxes in enumerate(seen[0]):
            for i in range(len(boxes)):
                box, single = boxes[i : i + 1], slice(image, image + 1)
                student = model.s_head.predict([x[single] for x in aligned], [box])
                finer = [features[f"p{level}"][single] for level in range(2, 7)]
                teacher = model.t_head.features(finer, [box])
                cls += 1 - torch.cosine_similarity(student.logits, teacher.logits, eps=0.01).item()
                pair = student.reg_feature.relu(), teacher.reg_feature.relu()
                reg += 1 - torch.cosine_similarity(*pair, eps=0.01).item()
                count += 1
    assert count == 48
    assert losses["loss_mimic_cls"].item() == pytest.approx(cls / count, rel=1e-3)
    assert losses["loss_mimic_reg"].item() == pytest.approx(reg / count, rel=1e-3)


def test_weight_of_the_mimic_loss():
    once, _ = losses_of(mimicdet_model(), tiny_batch())
    twice, _ = losses_of(mimicdet_model(**{"MODEL.MIMICDET.MIMIC.WEIGHT": 2.0}), tiny_batch())
    for name in MIMIC:
        assert twice[name].item() == pytest.approx(2 * once[name].item(), rel=1e-5)
    for name in REFINE | S_HEAD | T_HEAD:
        assert twice[name].item() == pytest.approx(once[name].item(), rel=1e-5)


def test_scalars():
    model = mimicdet_model()
    losses, scalars = losses_of(model, tiny_batch())
    for name in ("cls", "reg"):
        cosine = 1 - losses[f"loss_mimic_{name}"].item()
        assert scalars[f"mimicdet/cosine_{name}"] == pytest.approx(cosine, abs=1e-5)
    # of the micro-networks' own output, all levels and images together
    images = model.preprocess_image(tiny_batch())
    with torch.no_grad():
        features = model.backbone(images.tensor)
        levels = [features[name] for name in model.head_in_features]
        _, deltas = model.refinement.rpn_head(levels)
        values, spread = [], []
        for size, delta in zip((3, 5, 5, 5, 5), deltas):
            offsets = model.s_head.align[str(size)].micro_network(delta)
            values.append(offsets.flatten())
            spread.append((offsets - offsets.mean(dim=(2, 3), keepdim=True)).flatten())
    rms = torch.cat(values).square().mean().sqrt().item()
    std = torch.cat(spread).square().mean().sqrt().item()
    assert scalars["s_head/offset_rms"] == pytest.approx(rms, rel=1e-4)
    assert scalars["s_head/offset_spatial_std"] == pytest.approx(std, rel=1e-4)
    assert 0 < std < rms

    quiet = mimicdet_model(**{"MODEL.MIMICDET.LOG_PERIOD": 20})
    assert "s_head/offset_rms" not in losses_of(quiet, tiny_batch(), iteration=20)[1]
    assert "s_head/offset_rms" in losses_of(quiet, tiny_batch(), iteration=39)[1]


@pytest.mark.parametrize("align, warns", [("guided", True), ("deform", True), ("conv", False)])
def test_warning_of_inert_offsets(align, warns, caplog):
    """The paper's initial offsets are equal in all cells up to 1e-4 cells."""
    model = mimicdet_model(
        lively=False,
        **{"MODEL.MIMICDET.S_HEAD.ALIGN": align, "MODEL.MIMICDET.OFFSET_WARNING_ITER": 30},
    )
    with caplog.at_level(logging.WARNING):
        losses_of(model, tiny_batch(), iteration=29)
        assert "OFFSET_INIT_STD" not in caplog.text
        losses_of(model, tiny_batch(), iteration=30)
        assert ("OFFSET_INIT_STD" in caplog.text) == warns
        caplog.clear()
        losses_of(model, tiny_batch(), iteration=31)
        assert "OFFSET_INIT_STD" not in caplog.text
        lively = mimicdet_model(**{"MODEL.MIMICDET.OFFSET_WARNING_ITER": 30})
        losses_of(lively, tiny_batch(), iteration=30)
        assert "OFFSET_INIT_STD" not in caplog.text


def test_pictures_of_training(monkeypatch):
    """Every VIS_PERIOD iterations Detectron2 gets detections of the S-head to draw."""
    model, drawn = mimicdet_model(**{"VIS_PERIOD": 5}), []
    monkeypatch.setattr(model, "visualize_training", lambda *args: drawn.append(args))
    losses_of(model, tiny_batch(), iteration=4)
    assert drawn == []
    losses_of(model, tiny_batch(), iteration=5)
    ((inputs, found),) = drawn
    assert len(inputs) == len(found) == 2
    assert all(len(x.pred_boxes) == len(x.scores) > 0 for x in found)


def test_export(tmp_path):
    """The deployed model: no T-head, no P2, strict, the same detections."""
    cfg = mimicdet_cfg(**{"OUTPUT_DIR": str(tmp_path)})
    model = mimicdet_model()
    weights = save_weights(model, tmp_path / "model.pth", CLASSES)
    export = export_student(cfg, weights, str(tmp_path / "deployed"))
    assert export.packages == ["kd_d2.modeling", "kd_d2.projects.mimicdet"]
    assert export.num_detections > 0

    state = torch.load(export.files[0], weights_only=True)["model"]
    assert not [k for k in state if k.startswith(("t_head", "backbone.fpn_lateral2"))]
    assert not [k for k in state if k.startswith("backbone.fpn_output2")]
    lost = set(model.state_dict()) - set(state)
    assert len(lost) == export.dropped > 0
    assert {k.split(".")[0] for k in lost} == {"t_head", "backbone"}

    deployed_cfg = mimicdet_cfg()
    deployed_cfg.merge_from_file(export.files[-1])
    assert not deployed_cfg.MODEL.MIMICDET.T_HEAD.ENABLED
    assert deployed_cfg.MODEL.FPN.IN_FEATURES == ["res3", "res4", "res5"]
    deployed = build_model(deployed_cfg)
    deployed.load_state_dict(state, strict=True)
    assert deployed.t_head is None and "p2" not in deployed.backbone.output_shape()
    batch = tiny_batch()
    assert_same(detections(deployed, batch), detections(model, batch))


def test_export_of_the_t_head_keeps_everything(tmp_path):
    cfg = mimicdet_cfg(**{"MODEL.MIMICDET.EVAL_HEAD": "teacher"})
    weights = save_weights(mimicdet_model(), tmp_path / "model.pth", CLASSES)
    export = export_student(cfg, weights, str(tmp_path / "deployed"))
    assert export.dropped == 0 and export.num_detections > 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"MODEL.MIMICDET.EVAL_HEAD": "T"}, "EVAL_HEAD must be one of"),
        ({"MODEL.MIMICDET.TEACHER.MODE": "other"}, "TEACHER.MODE must be one of"),
        ({"MODEL.MIMICDET.T_HEAD.ENABLED": False}, "set MIMIC.WEIGHT to 0"),
        ({"MODEL.MIMICDET.S_HEAD.ENABLED": False}, "set MIMIC.WEIGHT to 0"),
        (
            {**MIMIC_OFF, "MODEL.MIMICDET.S_HEAD.ENABLED": False},
            "EVAL_HEAD is 'student', but S_HEAD.ENABLED is False",
        ),
        (
            {**T_HEAD_OFF, "MODEL.MIMICDET.EVAL_HEAD": "teacher"},
            "EVAL_HEAD is 'teacher', but T_HEAD.ENABLED is False",
        ),
        ({**MIMIC_OFF, "MODEL.MIMICDET.T_HEAD.ENABLED": False}, "leave res2 out"),
        ({"MODEL.ROI_HEADS.IN_FEATURES": P3_TO_P7}, "leave res2 out"),
        (
            {"MODEL.BACKBONE.NAME": "build_kd_resnet_fpn_backbone"},
            "use build_mimicdet_resnet_fpn_backbone",
        ),
        ({"MODEL.MIMICDET.LOG_PERIOD": 0}, "LOG_PERIOD must be positive"),
    ],
)
def test_what_does_not_fit_is_said(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(mimicdet_cfg(**overrides))


def test_tap():
    model = mimicdet_model()
    tap = build_tap(model)
    keys = tap.keys(model)
    assert keys["neck"].channels == 32 and keys["neck"].strides == (8, 16, 32, 64, 128)
    assert keys["neck.p2"].strides == (4,) and keys["backbone.res4"].strides == (16,)
    with tap.observe(model, ["neck", "neck.p2", "anchors", "path:sampler"]) as seen, storage():
        model(tiny_batch())
    features = model.backbone(model.preprocess_image(tiny_batch()).tensor)
    for ours, name in zip(seen["neck"], P3_TO_P7):
        assert torch.allclose(ours, features[name], atol=1e-5)
    assert seen["neck.p2"].shape[-1] == 32
    assert seen["anchors"][0].tensor[0].tolist() == [-12.0, -12.0, 20.0, 20.0]
    (sampled,) = seen["path:sampler"]
    assert [len(x) for x in sampled] == [24, 24]
    assert tap.anchor_strides(model) == [8, 16, 32, 64, 128]


def test_diagnostics_are_built_from_the_config():
    record = Diagnostics(mimicdet_cfg(**{"MODEL.MIMICDET.OFFSET_WARNING_ITER": 7}))
    assert (record.period, record.offset_warning_iter) == (1, 7)
