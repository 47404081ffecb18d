"""Tap of dense detectors: what each key means, for every family, against naive loops."""

import copy
import functools

import pytest
import torch
from detectron2.modeling import build_backbone
from detectron2.modeling.meta_arch.fcos import FCOS as UpstreamFCOS
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from kd_d2.distillation import KeyInfo, build_tap
from kd_d2.distillation.dense_tap import codec_signature, stage_ends
from tests.fixtures import tiny_batch, tiny_cfg, tiny_model

STRIDES = (8, 16, 32, 64, 128)
LEVELS = ("p3", "p4", "p5", "p6", "p7")


def _upstream_fcos():
    """Detectron2's FCOS, which no YAML reaches, built by hand."""
    cfg = tiny_cfg("FCOS")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        head = FCOSHead(
            input_shape=[shapes[name] for name in LEVELS],
            num_classes=3,
            conv_dims=[32, 32],
            norm="GN",
        )
        for module in head.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.06)
    return UpstreamFCOS(
        backbone=backbone,
        head=head,
        head_in_features=list(LEVELS),
        num_classes=3,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    ).train()


VARIANTS = {
    "RetinaNet": lambda: tiny_model("RetinaNet"),
    "RetinaNet-GN": lambda: tiny_model("RetinaNet", **{"MODEL.RETINANET.NORM": "GN"}),
    "RetinaNet-BN": lambda: tiny_model("RetinaNet", **{"MODEL.RETINANET.NORM": "BN"}),
    "GFL": lambda: tiny_model("GFL"),
    "GFL-nonorm": lambda: tiny_model("GFL", **{"MODEL.GFL.NORM": ""}),
    "ATSS": lambda: tiny_model("ATSS"),
    "FCOS-paper": lambda: tiny_model("FCOS"),
    "FCOS-d2": lambda: tiny_model("FCOS", **{"MODEL.FCOS.PRESET": "d2"}),
    "upstream-FCOS": _upstream_fcos,
}
every_variant = pytest.mark.parametrize("variant", list(VARIANTS))


@functools.lru_cache(None)
def _prototype(variant):
    return VARIANTS[variant]()


def _model(variant):
    return copy.deepcopy(_prototype(variant))


def _batch(**kwargs):
    return tiny_batch(**{"sizes": [(64, 64), (48, 60)], **kwargs})


def _observe(model, keys=None, batch=None):
    tap = build_tap(model)
    with EventStorage(), tap.observe(model, keys or list(tap.keys(model))) as observation:
        model(batch or _batch())
    observation.gt_instances = [x["instances"] for x in batch or _batch()]
    return tap, observation


@functools.lru_cache(None)
def _observed(variant):
    """Model, tap and observation of one training forward, for tests that only read."""
    model = _model(variant)
    return (model, *_observe(model))


def _images(model):
    return model.preprocess_image(_batch()).tensor


def _pyramid(model):
    features = model.backbone(_images(model))
    return [features[name] for name in LEVELS]


def _naive_tower(tower, features):
    """Inputs and outputs of the activations, [stage][level]; levels one after the other."""
    before, after = {}, {}
    for feature in features:
        x, stage = feature, 0
        for module in tower:
            if isinstance(module, nn.ReLU):
                stage += 1
                before.setdefault(stage, []).append(x)
                after.setdefault(stage, []).append(module(x))
            x = module(x)
    return before, after


def _equal(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


# what keys() must say: width of the towers and the predictions, worked out by hand
WIDTHS = {
    "RetinaNet": (32, 4 * 3, 4 * 4, None),
    "RetinaNet-GN": (32, 4 * 3, 4 * 4, None),
    "RetinaNet-BN": (32, 4 * 3, 4 * 4, None),
    "GFL": (64, 3, 4 * 17, None),
    "GFL-nonorm": (64, 3, 4 * 17, None),
    "ATSS": (64, 3, 4, "box"),
    "FCOS-paper": (64, 3, 4, "cls"),
    "FCOS-d2": (64, 3, 4, "box"),
    "upstream-FCOS": (32, 3, 4, "box"),
}


@every_variant
def test_keys_with_widths_and_strides(variant):
    model = _model(variant)
    width, classes, box, centerness = WIDTHS[variant]
    expected = {
        "backbone.res3": KeyInfo(128, (8,)),
        "backbone.res4": KeyInfo(256, (16,)),
        "backbone.res5": KeyInfo(512, (32,)),
        **{f"neck.{name}": KeyInfo(32, (stride,)) for name, stride in zip(LEVELS, STRIDES)},
        "neck": KeyInfo(32, STRIDES),
        "pred.cls": KeyInfo(classes, STRIDES, (3,)),
        "pred.box": KeyInfo(box, STRIDES),
    }
    for branch in ("cls", "box"):
        expected[f"head.{branch}[0]"] = KeyInfo(32, STRIDES)
        for stage in (1, 2):
            expected[f"head.{branch}[{stage}]"] = KeyInfo(width, STRIDES)
            expected[f"head.{branch}[{stage}]:pre"] = KeyInfo(width, STRIDES)
    if centerness:
        expected["pred.ctr"] = KeyInfo(1, STRIDES, (centerness,))
    keys = dict(build_tap(model).keys(model))
    # these carry facts of the model, see the tests below
    assert keys.pop("anchors").strides == keys.pop("assign").strides == STRIDES
    keys.pop("codec")
    assert keys == expected
    assert build_tap(model).num_stages(model, "cls") == 2


@every_variant
def test_values_equal_a_naive_run_of_the_same_modules(variant):
    _, _, seen = _observed(variant)
    model_again = _model(variant)
    bottom_up = model_again.backbone.bottom_up(_images(model_again))
    pyramid = _pyramid(model_again)
    for name in ("res3", "res4", "res5"):
        assert torch.equal(seen[f"backbone.{name}"], bottom_up[name])
    assert all(torch.equal(seen[f"neck.{n}"], f) for n, f in zip(LEVELS, pyramid))
    assert _equal(seen["neck"], pyramid)
    for branch, tower in (("cls", "cls_subnet"), ("box", "bbox_subnet")):
        assert _equal(seen[f"head.{branch}[0]"], pyramid)
        before, after = _naive_tower(getattr(model_again.head, tower), pyramid)
        assert sorted(after) == [1, 2]
        for stage in after:
            assert _equal(seen[f"head.{branch}[{stage}]"], after[stage])
            assert _equal(seen[f"head.{branch}[{stage}]:pre"], before[stage])
    outputs = model_again.head(pyramid)
    names = ("pred.cls", "pred.box", "pred.ctr")[: len(outputs)]
    for name, output in zip(names, outputs):
        assert _equal(seen[name], output)
    for level, stride in enumerate(STRIDES):
        size = (-(-64 // stride), -(-64 // stride))
        assert all(seen[name][level].shape[-2:] == size for name in names)


@every_variant
def test_pre_is_before_the_activation(variant):
    _, _, seen = _observed(variant)
    for branch in ("cls", "box"):
        for stage in (1, 2):
            post, pre = seen[f"head.{branch}[{stage}]"], seen[f"head.{branch}[{stage}]:pre"]
            assert all(torch.equal(a, b.clamp(min=0)) for a, b in zip(post, pre))
            assert pre[0].min() < 0  # otherwise the comparison would say nothing


@every_variant
def test_observed_values_are_the_students_with_their_graph(variant):
    _, _, seen = _observed(variant)
    for key in ("neck", "head.cls[1]", "head.box[2]:pre", "pred.cls", "pred.box"):
        assert all(value.requires_grad for value in seen[key]), key
    (gradient,) = torch.autograd.grad(
        seen["pred.cls"][0].sum(), [seen["head.cls[1]"][0]], retain_graph=True
    )
    assert gradient.abs().sum() > 0


@every_variant
def test_rest_of_head_completes_the_models_own_predictions_exactly(variant):
    model, tap, seen = _observed(variant)
    centerness = WIDTHS[variant][3]
    for branch in ("cls", "box"):
        expected = {branch, "ctr"} if branch == centerness else {branch}
        for start in range(3):
            rest = tap.rest_of_head(model, branch, start, seen[f"head.{branch}[{start}]"])
            assert set(rest) == expected
            for name, predictions in rest.items():
                assert _equal(predictions, seen[f"pred.{name}"]), (branch, start, name)


@pytest.mark.parametrize("family", ["FCOS", "GFL", "ATSS"])
def test_rest_of_head_applies_the_scale_of_each_level(family):
    model = tiny_model(family, **{f"MODEL.{family}.NORM": ""})
    tap = build_tap(model)
    scales = [scale.scale.item() for scale in model.head.scales]
    assert len(set(scales)) == 5
    features = [torch.rand(1, 64, 3, 3)] * 5
    boxes = tap.rest_of_head(model, "box", 2, features)["box"]
    for box, scale in zip(boxes, scales):
        torch.testing.assert_close(box, model.head.bbox_pred(features[0]) * scale)


@pytest.mark.parametrize("variant", ["RetinaNet-BN", "GFL", "FCOS-paper"])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_gradients_cross_the_frozen_rest_into_the_given_features(variant, start):
    model = _model(variant).eval()
    model.requires_grad_(False)
    tap = build_tap(model)
    width = 32 if start == 0 else WIDTHS[variant][0]
    generator = torch.Generator().manual_seed(5)
    sizes = [8, 4, 2, 2, 2]
    ours = [torch.randn(2, width, s, s, generator=generator).requires_grad_() for s in sizes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    sum((p**2).sum() for p in tap.rest_of_head(model, "cls", start, ours)["cls"]).backward()
    ends = [-1] + [i for i, m in enumerate(model.head.cls_subnet) if isinstance(m, nn.ReLU)]
    total = 0.0
    for x in theirs:
        for module in list(model.head.cls_subnet)[ends[start] + 1 :]:
            x = module(x)
        total = total + (model.head.cls_score(x) ** 2).sum()
    total.backward()
    for ours_level, theirs_level in zip(ours, theirs):
        assert ours_level.grad.abs().max() > 0
        torch.testing.assert_close(ours_level.grad, theirs_level.grad, rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_reach_exactly_the_later_layers_of_one_branch():
    model = _model("GFL")
    tap, seen = _observe(model)
    features = [x.detach() for x in seen["head.cls[1]"]]
    loss = sum(p.sum() for p in tap.rest_of_head(model, "cls", 1, features)["cls"])
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    # of the tower conv, norm, relu, conv, norm, relu those of the second stage, no conv bias
    assert reached == {
        "head.cls_subnet.3.weight",
        "head.cls_subnet.4.weight",
        "head.cls_subnet.4.bias",
        "head.cls_score.weight",
        "head.cls_score.bias",
    }


def test_grad_mode_of_rest_of_head_is_the_callers():
    model = _model("GFL")
    tap, seen = _observe(model)
    with torch.no_grad():
        rest = tap.rest_of_head(model, "cls", 1, seen["head.cls[1]"])
    assert not rest["cls"][0].requires_grad


def test_level_counting_norms_end_where_they_began_and_keep_their_statistics():
    model = _model("RetinaNet-BN")
    tap, seen = _observe(model)
    norms = [m for m in model.head.modules() if hasattr(m, "_pos")]
    assert len(norms) == 4 and all(n._pos == 0 for n in norms)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert any("running_mean" in name and "head" in name for name in buffers)
    for start in range(3):
        # other statistics than those of the model's own features
        foreign = [3 * x + 1 for x in seen[f"head.cls[{start}]"]]
        tap.rest_of_head(model, "cls", start, foreign)
        assert all(n._pos == 0 for n in norms)
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    # the model's own forward still moves them
    _observe(model)
    assert any(not torch.equal(v, buffers[n]) for n, v in model.named_buffers() if "mean" in n)
    assert all(n._pos == 0 for n in norms)


@every_variant
def test_wrong_levels_and_stages_are_refused_before_anything_runs(variant):
    model, tap, _ = _observed(variant)
    features = [torch.zeros(1, 32, 4, 4)] * 5
    with pytest.raises(ValueError, match="needs all 5 levels of .*, got 4"):
        tap.rest_of_head(model, "cls", 0, features[:4])
    with pytest.raises(ValueError, match=r"start must lie in 0\.\.2, got 3"):
        tap.rest_of_head(model, "cls", 3, features)
    with pytest.raises(ValueError, match=r"start must lie in 0\.\.2, got -1"):
        tap.rest_of_head(model, "box", -1, features)
    assert all(m._pos == 0 for m in model.modules() if hasattr(m, "_pos"))


@every_variant
def test_assign_equals_what_the_training_forward_used(variant, monkeypatch):
    model = _model(variant)
    used = []
    original = model.label_anchors

    def spy(anchors, gt_instances):
        used.append(([a.tensor.clone() for a in anchors], original(anchors, gt_instances)))
        return used[-1][1]

    monkeypatch.setattr(model, "label_anchors", spy)
    batch = _batch(num_gt=(4, 0))
    _, seen = _observe(model, batch=batch)
    ((anchors, (labels, boxes)),) = used
    normalizer = getattr(model, "loss_normalizer", None)
    with EventStorage() as storage:
        assignment = seen["assign"]
    assert storage.latest() == {}
    assert getattr(model, "loss_normalizer", None) == normalizer
    assert len(used) == 2  # matched a second time
    assert _equal([a.tensor for a in seen["anchors"]], anchors)
    assert torch.equal(assignment.labels, torch.stack(labels))
    assert torch.equal(assignment.boxes, torch.stack(boxes))
    assert assignment.labels.shape == (2, sum(len(a) for a in anchors))
    assert assignment.num_classes == 3
    assert assignment.positive[0].any() and not assignment.positive[1].any()
    gt = batch[0]["instances"]
    for row in assignment.positive[0].nonzero()[:, 0].tolist():
        pairs = zip(gt.gt_boxes.tensor, gt.gt_classes)
        label, box = assignment.labels[0, row], assignment.boxes[0, row]
        assert any(torch.equal(box, b) and label == c for b, c in pairs)


@every_variant
def test_anchors_lie_on_the_grid_of_their_level(variant):
    _, _, seen = _observed(variant)
    per_cell = 4 if variant.startswith("RetinaNet") else 1
    offset = 0.5 if "FCOS" in variant else 0.0
    for anchors, stride in zip(seen["anchors"], STRIDES):
        side = -(-64 // stride)
        centers = anchors.get_centers().reshape(side, side, per_cell, 2)
        for y in range(side):
            for x in range(side):
                expected = torch.tensor([(x + offset) * stride, (y + offset) * stride])
                torch.testing.assert_close(centers[y, x], expected.expand(per_cell, 2))


# raw value of every box prediction -> box around an anchor with centre c, sides (w, h), stride s
DECODED = {
    "RetinaNet": (0.0, lambda w, h, s: (w / 2, h / 2)),
    "ATSS": (0.0, lambda w, h, s: (w / 2, h / 2)),
    # equal logits: the mean of the bins 0..16, in strides
    "GFL": (0.7, lambda w, h, s: (8 * s, 8 * s)),
    "FCOS-paper": (0.0, lambda w, h, s: (1.0, 1.0)),  # exp(0) pixels
    "FCOS-d2": (1.5, lambda w, h, s: (1.5 * s, 1.5 * s)),
    "upstream-FCOS": (1.5, lambda w, h, s: (1.5 * s, 1.5 * s)),
}


@pytest.mark.parametrize("variant", list(DECODED))
def test_codec_decodes_raw_predictions_to_pixels(variant):
    _, _, seen = _observed(variant)
    raw, half_sides = DECODED[variant]
    for level, stride in enumerate(STRIDES):
        anchors = seen["anchors"][level].tensor
        dim = seen["pred.box"][level].shape[1] // (4 if variant.startswith("Ret") else 1)
        decoded = seen["codec"].apply_deltas(torch.full((len(anchors), dim), raw), anchors)
        for box, anchor in zip(decoded[:9], anchors):
            x, y = (anchor[0] + anchor[2]) / 2, (anchor[1] + anchor[3]) / 2
            dx, dy = half_sides(anchor[2] - anchor[0], anchor[3] - anchor[1], stride)
            torch.testing.assert_close(box, torch.stack([x - dx, y - dy, x + dx, y + dy]))


def _info(key, family, **overrides):
    model = tiny_model(family, **overrides)
    return build_tap(model).keys(model)[key]


def test_signatures_tell_models_apart_that_cannot_be_compared():
    weights = {"MODEL.RETINANET.BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0)}
    assert _info("codec", "RetinaNet") == _info("codec", "RetinaNet", seed=1)
    assert _info("codec", "RetinaNet") != _info("codec", "RetinaNet", **weights)
    assert _info("codec", "GFL") != _info("codec", "GFL", **{"MODEL.GFL.REG_MAX": 12})
    assert _info("codec", "FCOS") != _info("codec", "FCOS", **{"MODEL.FCOS.PRESET": "d2"})
    sizes = {"MODEL.ANCHOR_GENERATOR.SIZES": [[16, 20], [32, 48], [64, 96], [128, 192], [256, 384]]}
    assert _info("anchors", "RetinaNet") == _info("anchors", "RetinaNet", seed=1)
    assert _info("anchors", "RetinaNet") != _info("anchors", "RetinaNet", **sizes)
    assert _info("anchors", "GFL") == _info("anchors", "ATSS") != _info("anchors", "FCOS")


def test_codec_signature_compares_numbers_and_ignores_identity():
    class Codec:
        def __init__(self, weights, module):
            self.weights, self.module, self._cache = weights, module, object()

    one, two = Codec([1.0, 2.0], nn.ReLU()), Codec((1.0, 2.0), nn.ReLU())
    assert codec_signature(one) == codec_signature(two)
    assert codec_signature(one) != codec_signature(Codec((1.0, 3.0), nn.ReLU()))
    assert codec_signature(one) != codec_signature(Codec((1.0, 2.0), nn.GELU()))


def test_stages_end_with_any_activation():
    tower = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1), nn.SiLU(), nn.Conv2d(1, 1, 1), nn.LeakyReLU()
    )
    assert stage_ends(tower) == [2, 4]
    assert stage_ends(nn.Sequential()) == []


def test_a_head_without_tower_stages():
    model = tiny_model("GFL", **{"MODEL.GFL.NUM_CONVS": 0})
    tap, seen = _observe(model)
    assert [k for k in tap.keys(model) if k.startswith("head.")] == ["head.cls[0]", "head.box[0]"]
    rest = tap.rest_of_head(model, "box", 0, seen["head.box[0]"])
    assert _equal(rest["box"], seen["pred.box"])


@every_variant
def test_staged_run_equals_the_eval_models_own_raw_outputs(variant):
    model = _model(variant).eval()
    tap = build_tap(model)
    own = {}

    def keep(_, inputs, output):  # before inference overwrites anything in place
        own["neck"] = [x.clone() for x in inputs[0]]
        own["pred"] = [[x.clone() for x in levels] for levels in output]

    handle = model.head.register_forward_hook(keep)
    with torch.no_grad():
        model(_batch())
    handle.remove()
    gt_instances = [x["instances"] for x in _batch()]
    run = tap.run(model, _images(model), list(tap.keys(model)), gt_instances)
    assert _equal(run["neck"], own["neck"])
    for name, levels in zip(("cls", "box", "ctr"), own["pred"]):
        assert _equal(run[f"pred.{name}"], levels)
    for branch, tower in (("cls", model.head.cls_subnet), ("box", model.head.bbox_subnet)):
        with torch.no_grad():
            _, after = _naive_tower(tower, own["neck"])
        assert _equal(run[f"head.{branch}[2]"], after[2])
    labels, _ = model.label_anchors(model.anchor_generator(own["neck"]), run.gt_instances)
    assert torch.equal(run["assign"].labels, torch.stack(labels))


def test_any_module_can_be_reached_by_its_path():
    model = _model("RetinaNet-GN")
    keys = ["path:head.cls_score", "path:backbone.bottom_up.stem", "pred.cls"]
    _, seen = _observe(model, keys)
    assert _equal(seen["path:head.cls_score"], seen["pred.cls"])
    (stem,) = seen["path:backbone.bottom_up.stem"]
    assert torch.equal(stem, model.backbone.bottom_up.stem(_images(model)))
    run = build_tap(model).run(model, _images(model), keys)
    assert _equal(run["path:head.cls_score"], seen["pred.cls"])
    assert torch.equal(run["path:backbone.bottom_up.stem"][0], stem)


def test_odd_sizes_and_images_without_ground_truth():
    model = _model("ATSS")
    batch = tiny_batch(sizes=[(97, 65), (33, 127)], num_gt=(0, 1))
    _, seen = _observe(model, batch=batch)
    # padded to multiples of 32: 128 x 128
    assert [tuple(x.shape[-2:]) for x in seen["neck"]] == [(128 // s, 128 // s) for s in STRIDES]
    assert not seen["assign"].positive[0].any() and seen["assign"].positive[1].any()
    boxes = Boxes.cat(seen["anchors"])
    assert seen["assign"].labels.shape == (2, len(boxes))
