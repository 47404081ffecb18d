"""FCOS: oracles, a naive assigner, equality with Detectron2's FCOS, edge cases."""

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS as D2FCOS
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from kd_d2.config import get_cfg
from kd_d2.modeling.meta_arch.fcos import FCOS, FCOS_PRESETS, PointBox2BoxTransform, fcos_switches

NUM_CLASSES = 5


def fcos_cfg(preset="paper", **switches):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "FCOS"
    cfg.MODEL.BACKBONE.NAME = "build_kd_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL.FPN.P6_SOURCE = "p5"
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    cfg.MODEL.FCOS.NUM_CLASSES = NUM_CLASSES
    cfg.MODEL.FCOS.NUM_CONVS = 2
    cfg.MODEL.FCOS.PRESET = preset
    for key, value in switches.items():
        cfg.MODEL.FCOS[key] = value
    return cfg


def build(preset="paper", seed=0, **switches):
    torch.manual_seed(seed)
    return build_model(fcos_cfg(preset, **switches))


def gt(boxes, classes, size=(128, 128)):
    return Instances(
        size,
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


def random_gt(generator, count, size=(128, 128)):
    scale = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values.reshape(count, 4)
    boxes = corners * scale + torch.tensor([0.0, 0.0, 1.0, 1.0])
    classes = torch.randint(NUM_CLASSES, (count,), generator=generator)
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes)


def batch(seed=0, counts=(3, 2), sizes=((128, 128), (96, 121))):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator),
            "instances": random_gt(generator, count, size),
        }
        for count, size in zip(counts, sizes)
    ]


def losses_of(model, inputs):
    with EventStorage():
        return model.train()(inputs)


def points_of(model, shapes=((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))):
    return model.anchor_generator([torch.zeros(1, 1, h, w) for h, w in shapes])


# Assignment


def naive_labels(points, strides, instances, matcher, radius):
    """Loop over points and boxes, straight from the description."""
    ranges = {8: (-1, 64), 16: (64, 128), 32: (128, 256), 64: (256, 512), 128: (512, math.inf)}
    labels, matched = [], []
    for (x, y), stride in zip(points.tolist(), strides.tolist()):
        best, label, box = math.inf, NUM_CLASSES, None
        low, high = ranges[int(stride)]
        for (x1, y1, x2, y2), cls in zip(
            instances.gt_boxes.tensor.tolist(), instances.gt_classes.tolist()
        ):
            sides = (x - x1, y - y1, x2 - x, y2 - y)
            far, area = max(sides), (x2 - x1) * (y2 - y1)
            in_range = low <= far <= high if matcher == "paper" else low < far < high
            central = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < radius * stride
            if min(sides) > 0 and in_range and (radius == 0 or central) and area < best:
                best, label, box = area, cls, (x1, y1, x2, y2)
        labels.append(label)
        matched.append(box)
    return labels, matched


@pytest.mark.parametrize("preset", ["paper", "d2"])
@pytest.mark.parametrize("seed", range(3))
def test_assignment_equals_a_naive_loop(preset, seed):
    model = build(preset, NUM_CONVS=0)
    shapes = [(64, 96), (32, 48), (16, 24), (8, 12), (4, 6)]  # 512 x 768
    anchors = points_of(model, shapes)
    instances = random_gt(torch.Generator().manual_seed(seed), 12, (512, 768))
    (labels,), (boxes,) = model.label_anchors(anchors, [instances])
    flat = Boxes.cat(anchors)
    strides = flat.tensor[:, 2] - flat.tensor[:, 0]
    expected, matched = naive_labels(
        flat.get_centers(), strides, instances, model.matcher, model.center_radius
    )
    assert labels.tolist() == expected
    assert (labels < NUM_CLASSES).sum() > 20
    for row in (labels < NUM_CLASSES).nonzero().flatten().tolist():
        torch.testing.assert_close(boxes[row], torch.tensor(matched[row]))


def test_ends_of_the_level_ranges():
    # Seen from the p3 point (60, 60) the far sides of this box are exactly 64 pixels away, so
    # are those seen from no p4 point; the paper's range of p3 includes 64, Detectron2's does not.
    instances = gt([[28.0, 28.0, 124.0, 124.0]], [1])
    for matcher, expected in (("paper", 1), ("d2", NUM_CLASSES)):
        model = build("paper", MATCHER=matcher, NUM_CONVS=0)
        anchors = points_of(model)
        (labels,), _ = model.label_anchors(anchors, [instances])
        centers = anchors[0].get_centers()
        row = (centers == torch.tensor([60.0, 60.0])).all(dim=1).nonzero().item()
        assert labels[row] == expected


def test_points_and_smallest_box_wins():
    model = build(NUM_CONVS=0)
    anchors = points_of(model)
    assert anchors[0].get_centers()[0].tolist() == [4.0, 4.0]
    assert anchors[1].get_centers()[1].tolist() == [24.0, 8.0]
    instances = gt([[0.0, 0.0, 60.0, 60.0], [8.0, 8.0, 32.0, 32.0]], [3, 1])
    (labels,), (boxes,) = model.label_anchors(anchors, [instances])
    labels = labels[:256].reshape(16, 16)
    assert (labels[1:4, 1:4] == 1).all() and labels[0, 0] == 3
    assert (labels == 1).sum() == 9 and (labels == 3).sum() == 7 * 7 - 9


def test_point_on_the_border_is_outside():
    model = build(NUM_CONVS=0)
    (labels,), _ = model.label_anchors(points_of(model), [gt([[4.0, 4.0, 20.0, 20.0]], [0])])
    assert (labels == 0).sum() == 1  # only (12, 12)


def test_label_anchors_is_repeatable_and_stateless():
    model = build("d2")
    inputs = batch()
    anchors = points_of(model)
    gts = [x["instances"] for x in inputs]
    losses_of(model, inputs)
    before = model.loss_normalizer
    first, second = (model.label_anchors(anchors, gts) for _ in range(2))
    for a, b in zip(first, second):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert model.loss_normalizer == before


def test_padding_is_background_not_ignored():
    model = build()
    small = gt([[0.0, 0.0, 30.0, 30.0]], [2], size=(32, 32))
    (labels,), _ = model.label_anchors(points_of(model), [small])
    assert ((labels >= 0) & (labels <= NUM_CLASSES)).all()


# Codec


@pytest.mark.parametrize("norm_by_stride", [False, True])
def test_codec(norm_by_stride):
    codec = PointBox2BoxTransform(norm_by_stride)
    assert codec.box_dim == 4
    anchors = torch.tensor([[0.0, 8.0, 8.0, 16.0], [16.0, 16.0, 32.0, 32.0]])  # (4,12), (24,24)
    boxes = torch.tensor([[2.0, 4.0, 12.0, 18.0], [20.0, 8.0, 56.0, 48.0]])
    ltrb = codec.get_deltas(anchors, boxes)
    stride = torch.tensor([[8.0], [16.0]]) if norm_by_stride else 1.0
    expected = torch.tensor([[2.0, 8.0, 8.0, 6.0], [4.0, 16.0, 32.0, 24.0]]) / stride
    torch.testing.assert_close(ltrb, expected)
    raw = ltrb if norm_by_stride else ltrb.log()
    torch.testing.assert_close(codec.apply_deltas(raw, anchors), boxes)
    # Raw 0: the point itself, or one pixel to each side; negative: never inverted.
    zero = codec.apply_deltas(torch.zeros(2, 4), anchors)
    torch.testing.assert_close(
        zero[:, 2:] - zero[:, :2], torch.full((2, 2), 2.0 - 2 * norm_by_stride)
    )
    wild = codec.apply_deltas(torch.randn(2, 4).half() * 50, anchors)
    assert wild.dtype == torch.float32 and wild.isfinite().all()
    assert (wild[:, 2:] >= wild[:, :2]).all()


# Losses by hand


def single_positive(ctr_logit=0.0, **switches):
    """One positive at the point (12, 12), l, t, r, b = 1, 2, 3, 2; every prediction is 0."""
    model = build(NUM_CONVS=0, **switches)
    anchors = points_of(model, ((2, 2),) * 1)
    sizes = [len(a) for a in anchors]
    predictions = [
        [torch.zeros(1, n, d) + (ctr_logit if d == 1 else 0) for n in sizes]
        for d in (NUM_CLASSES, 4, 1)
    ]
    instances = gt([[11.0, 10.0, 15.0, 14.0]], [2])
    labels, boxes = model.label_anchors(anchors, [instances])
    assert labels[0].tolist() == [NUM_CLASSES] * 3 + [2]
    with EventStorage():
        return model.losses(anchors, predictions, labels, boxes)


def test_paper_losses_by_hand():
    losses = single_positive(IN_FEATURES=["p3"])
    # Focal at p = 1/2: positive 0.25 * 0.25 * ln 2, 19 negatives 0.75 * 0.25 * ln 2; one positive.
    ln2 = math.log(2)
    assert losses["loss_fcos_cls"].item() == pytest.approx((0.0625 + 19 * 0.1875) * ln2, rel=1e-5)
    # Predicted box 2 x 2 around the point: overlap with [11, 10, 15, 14] is 2 x 2; IoU 4 / 16.
    # One positive: its weight 0.577350 cancels.
    assert losses["loss_fcos_loc"].item() == pytest.approx(math.log(4), rel=1e-5)
    # BCE at logit 0 is ln 2 for any target; the target itself shows in the derivative below.
    assert losses["loss_fcos_ctr"].item() == pytest.approx(ln2, rel=1e-5)


def test_centerness_target():
    # d BCE / d target = -logit: from two logits the target follows.
    a = single_positive(1.0, IN_FEATURES=["p3"])["loss_fcos_ctr"].item()
    target = math.log(1 + math.exp(1.0)) - a
    assert target == pytest.approx(0.577350, abs=1e-6)


def test_giou_and_unweighted_by_hand():
    losses = single_positive(IN_FEATURES=["p3"], BOX_LOSS="giou", CTR_WEIGHTED_BOX=False)
    # The prediction lies inside the target: GIoU is the IoU, 1/4.
    assert losses["loss_fcos_loc"].item() == pytest.approx(0.75, rel=1e-5)


def test_iou_loss_oracles():
    model = build(NUM_CONVS=0)
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1], [0, 0, 4, 2], [1, 1, 3, 4]])
    b = torch.tensor([[1.0, 1, 3, 3], [2, 0, 3, 1], [0, 0, 4, 4], [1, 1, 3, 4]])
    expected = torch.tensor([1.945910, 13.815511, 0.693147, 0.0])
    torch.testing.assert_close(model._box_losses(a, b), expected, rtol=1e-5, atol=1e-6)


# Presets and keys


def test_presets_fill_unset_switches_only():
    cfg = fcos_cfg("paper", BOX_LOSS="giou", CENTER_RADIUS=0.0)
    values = fcos_switches(cfg.MODEL.FCOS)
    assert values == {**FCOS_PRESETS["paper"], "BOX_LOSS": "giou"}
    assert fcos_switches(fcos_cfg("d2", CENTER_RADIUS=0.0).MODEL.FCOS)["CENTER_RADIUS"] == 0.0
    cfg = fcos_cfg()
    cfg.merge_from_list(["MODEL.FCOS.USE_SCALE", "False", "MODEL.FCOS.CENTER_RADIUS", "1.5"])
    values = fcos_switches(cfg.MODEL.FCOS)
    assert values["USE_SCALE"] is False and values["CENTER_RADIUS"] == 1.5
    # None survives a dump, as a resumed or exported run needs it.
    again = get_cfg()
    again.merge_from_other_cfg(type(cfg).load_cfg(cfg.dump()))
    assert fcos_switches(again.MODEL.FCOS) == values


@pytest.mark.parametrize(
    "preset, switches, message",
    [
        ("fcos", {}, "PRESET is 'fcos'"),
        ("custom", {"BOX_LOSS": "iou"}, "must be set"),
        ("paper", {"SCORE_MODE": "max"}, "SCORE_MODE is 'max'"),
        ("paper", {"CENTERNESS_ON": "box"}, "CENTERNESS_ON"),
        ("paper", {"CENTER_RADIUS": -1.0}, "CENTER_RADIUS"),
    ],
)
def test_wrong_switches_are_named(preset, switches, message):
    with pytest.raises(ValueError, match=message):
        build(preset, **switches)


def test_custom_with_all_switches_builds():
    model = build("custom", **{**FCOS_PRESETS["d2"], "CENTERNESS_ON": "none"})
    assert set(losses_of(model, batch())) == {"loss_fcos_cls", "loss_fcos_loc"}
    assert len(model.eval()([{"image": batch()[0]["image"]}])) == 1


def test_unknown_level_is_named():
    with pytest.raises(ValueError, match="p9"):
        build(IN_FEATURES=["p3", "p9"])


def test_heads_of_the_presets():
    paper, d2 = build("paper"), build("d2")
    assert len(paper.head.scales) == 5 and d2.head.scales is None
    assert paper.head.cls_subnet[0].bias is None and d2.head.cls_subnet[0].bias is not None
    assert paper.head.centerness_on == "cls" and d2.head.centerness_on == "reg"
    assert paper.head.cls_score.bias[0].item() == pytest.approx(-4.595120)


# Equality with Detectron2


def detectron2_twin(model, cfg):
    """Detectron2's FCOS as its lazy config builds it, on the same kind of backbone."""
    shapes = model.backbone.output_shape()
    torch.manual_seed(1)
    backbone = build_model(cfg).backbone
    twin = D2FCOS(
        backbone=backbone,
        head=FCOSHead(
            input_shape=list(shapes.values()),
            conv_dims=[64] * cfg.MODEL.FCOS.NUM_CONVS,
            num_classes=NUM_CLASSES,
            prior_prob=0.01,
            norm="GN",
        ),
        num_classes=NUM_CLASSES,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
    assert set(twin.state_dict()) == set(model.state_dict())
    twin.load_state_dict(model.state_dict())
    return twin


def make_confident(model, seed=0):
    """Spread the predictions so that many scores pass and distances vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for conv in (model.head.cls_score, model.head.bbox_pred, model.head.ctrness):
            conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * 0.15)
        model.head.cls_score.bias.fill_(-1.0)
        model.head.bbox_pred.bias.fill_(1.5)


def test_d2_preset_equals_detectron2_in_training():
    cfg = fcos_cfg("d2")
    model = build("d2")
    make_confident(model)
    twin = detectron2_twin(model, cfg).train()
    for step in range(3):  # the running normaliser moves alike
        inputs = batch(step, counts=(3, 6))
        expected, actual = losses_of(twin, inputs), losses_of(model, inputs)
        assert set(actual) == set(expected)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-7)
        assert model.loss_normalizer == twin.loss_normalizer
    sum(expected.values()).backward()
    sum(actual.values()).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), sorted_like(model, twin)):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def sorted_like(model, twin):
    parameters = dict(twin.named_parameters())
    return [(name, parameters[name]) for name, _ in model.named_parameters()]


def test_d2_preset_equals_detectron2_in_inference():
    cfg = fcos_cfg("d2")
    model = build("d2").eval()
    make_confident(model)
    twin = detectron2_twin(model, cfg).eval()
    inputs = [{"image": x["image"], "height": 200, "width": 180} for x in batch()]
    with torch.no_grad():
        expected, actual = twin(inputs), model(inputs)
    for a, b in zip(actual, expected):
        a, b = a["instances"], b["instances"]
        assert len(a) == len(b) > 50
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=0, atol=1e-5)
        assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize("seed", range(2))
def test_d2_assignment_equals_detectron2_with_equal_areas(seed):
    model = build("d2", NUM_CONVS=0)
    twin = D2FCOS.label_anchors
    generator = torch.Generator().manual_seed(seed)
    # Integer boxes of many equal and almost equal areas, which fp32 of 1e8 - area confuses.
    corner = torch.randint(0, 60, (30, 2), generator=generator).float()
    side = 40 + torch.randint(0, 3, (30, 2), generator=generator).float()
    instances = Instances(
        (128, 128),
        gt_boxes=Boxes(torch.cat([corner, corner + side], dim=1)),
        gt_classes=torch.randint(NUM_CLASSES, (30,), generator=generator),
    )
    anchors = points_of(model)

    class Reference:
        num_classes = NUM_CLASSES
        center_sampling_radius = 1.5
        _match_anchors = D2FCOS._match_anchors

    expected_labels, expected_boxes = twin(Reference(), anchors, [instances])
    labels, boxes = model.label_anchors(anchors, [instances])
    assert torch.equal(labels[0], expected_labels[0])
    positive = labels[0] < NUM_CLASSES
    assert torch.equal(boxes[0][positive], expected_boxes[0][positive])


# Edge cases


@pytest.mark.parametrize("preset", ["paper", "d2"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 2)])
def test_images_without_boxes(preset, counts):
    model = build(preset)
    losses = losses_of(model, batch(counts=counts))
    assert all(x.isfinite() for x in losses.values())
    if not any(counts):
        assert losses["loss_fcos_loc"] == 0 and losses["loss_fcos_ctr"] == 0
    sum(losses.values()).backward()
    # Connected: every trainable parameter has a gradient, maybe 0.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("preset", ["paper", "d2"])
def test_inference_leaves_raw_predictions_alone(preset):
    model = build(preset).eval()
    make_confident(model)
    with torch.no_grad():
        images = ImageList.from_tensors([torch.rand(3, 75, 131)], 32)
        features = list(model.backbone(images.tensor).values())
        raw = model.head(features)
        copies = [[x.clone() for x in levels] for levels in raw]
        (result,) = model.forward_inference(images, features, raw)
    assert len(result) > 0
    for levels, clones in zip(raw, copies):
        assert all(torch.equal(x, y) for x, y in zip(levels, clones))


def test_score_modes():
    # cls 0.5, centerness 0.5: "mul" passes 0.5 > 0.4 and reports 0.25; "sqrt" reports 0.5.
    for mode, threshold, expected in (("mul", 0.4, 0.25), ("sqrt", 0.4, 0.5), ("sqrt", 0.6, None)):
        model = build(IN_FEATURES=["p3"], SCORE_MODE=mode, SCORE_THRESH_TEST=threshold).eval()
        raw = [torch.zeros(1, d, 2, 2) for d in (NUM_CLASSES, 4, 1)]
        raw[0][0, 1:] = -9.0
        images = ImageList(torch.zeros(1, 3, 16, 16), [(16, 16)])
        features = [torch.zeros(1, 1, 2, 2)]
        (result,) = model.forward_inference(images, features, [[x] for x in raw])
        if expected is None:
            assert len(result) == 0
        else:
            assert result.scores.tolist() == pytest.approx([expected] * 4)
            assert result.pred_classes.tolist() == [0] * 4


def test_odd_sizes_and_one_pixel_boxes():
    model = build()
    inputs = batch(sizes=((33, 47), (65, 97)))
    inputs[0]["instances"] = gt([[5.0, 5.0, 5.5, 5.5], [0.0, 0.0, 47.0, 33.0]], [0, 1], (33, 47))
    losses = losses_of(model, inputs)
    assert all(x.isfinite() for x in losses.values())
    with torch.no_grad():
        assert len(model.eval()(inputs)) == 2


@pytest.mark.parametrize("preset", ["paper", "d2"])
def test_bf16_autocast_gives_finite_fp32_losses(preset):
    model = build(preset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, batch())
    assert all(x.isfinite() and x.dtype == torch.float32 for x in losses.values())
    reference = losses_of(build(preset), batch())
    for name, value in losses.items():
        torch.testing.assert_close(value, reference[name], rtol=0.05, atol=0.05)
    sum(losses.values()).backward()


def test_input_format_and_pixel_statistics_come_from_the_config():
    cfg = fcos_cfg()
    cfg.INPUT.FORMAT = "RGB"
    model = build_model(cfg)
    assert isinstance(model, FCOS) and model.input_format == "RGB"
    assert model.pixel_std.flatten().tolist() == pytest.approx([57.375, 57.12, 58.395])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", ["paper", "d2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_gpu(preset, dtype):
    cfg = fcos_cfg(preset)
    cfg.MODEL.DEVICE = "cuda"
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.autocast("cuda", dtype=dtype):
        losses = losses_of(model, batch())
        detections = model.eval()(batch())
    assert all(x.isfinite() and x.dtype == torch.float32 for x in losses.values())
    assert len(detections) == 2
    sum(losses.values()).backward()
