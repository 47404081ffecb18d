"""GFL and ATSS as whole detectors on small images."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from fvcore.nn import giou_loss

from kd_d2.config import get_cfg
from kd_d2.modeling.meta_arch import ATSS, GFL, atss, gfl

CONFIGS = Path(__file__).parents[3] / "configs"
ARCHITECTURES = {"GFL": GFL, "ATSS": ATSS}
LOSS_NAMES = {
    "GFL": {"loss_gfl_cls", "loss_gfl_box", "loss_gfl_dfl"},
    "ATSS": {"loss_atss_cls", "loss_atss_box", "loss_atss_ctr"},
}
both = pytest.mark.parametrize("name", list(ARCHITECTURES))


def _cfg(name, *opts):
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / f"Base-{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    cfg.MODEL[name].NUM_CLASSES = 3
    cfg.MODEL[name].NUM_CONVS = 2
    cfg.merge_from_list(list(opts))
    return cfg


def _model(name, *opts, seed=0):
    torch.manual_seed(seed)
    return build_model(_cfg(name, *opts))


def _instances(size, boxes, classes):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def _image(size, boxes=(), classes=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
    return {"image": pixels, "instances": _instances(size, list(boxes), list(classes))}


def _batch():
    return [
        _image((128, 96), [[10, 12, 70, 80], [40, 60, 90, 120], [5, 5, 21, 25]], [0, 2, 1]),
        _image((90, 61), [[3, 4, 50, 70]], [1], seed=1),
    ]


def _anchors(model, height, width):
    strides = model.anchor_generator.strides
    return model.anchor_generator(
        [torch.zeros(1, 1, math.ceil(height / s), math.ceil(width / s)) for s in strides]
    )


@both
def test_interface_shared_by_dense_detectors(name):
    model = _model(name)
    assert isinstance(model, ARCHITECTURES[name])
    assert model.num_classes == 3 and model.head_in_features == ["p3", "p4", "p5", "p6", "p7"]
    coder, anchors = model.box2box_transform, Boxes.cat(_anchors(model, 64, 64)).tensor
    assert coder.box_dim == {"GFL": 4 * 17, "ATSS": 4}[name]
    assert coder.apply_deltas(torch.zeros(len(anchors), coder.box_dim), anchors).shape == (
        len(anchors),
        4,
    )
    assert coder.get_deltas(anchors, anchors).shape == (len(anchors), 4)
    # One square per cell, side 8 strides, centred on (x, y) * stride.
    first = _anchors(model, 64, 64)[0].tensor
    torch.testing.assert_close(first[9], torch.tensor([8.0 - 32, 8 - 32, 8 + 32, 8 + 32]))


@both
def test_labels_of_images_of_different_size(name):
    model, batch = _model(name), _batch()
    instances = [x["instances"] for x in batch]
    anchors = _anchors(model, 128, 96)
    labels, boxes = model.label_anchors(anchors, instances)
    assert [x.dtype for x in labels] == [torch.int64] * 2
    assert (labels[0] >= 0).all()

    # The second image is 96 x 64 with the padding it needs itself: cells beyond are invalid.
    alone_labels, alone_boxes = model.label_anchors(_anchors(model, 96, 64), instances[1:])
    assert (alone_labels[0] >= 0).all()
    valid = labels[1] >= 0
    assert (~valid).any()
    assert torch.equal(labels[1][valid], alone_labels[0])
    assert torch.equal(boxes[1][valid], alone_boxes[0])

    for label, box, truth in zip(labels, boxes, instances):
        positive = (label >= 0) & (label < 3)
        assert positive.any()
        for one_label, one_box in zip(label[positive], box[positive]):
            row = (truth.gt_boxes.tensor == one_box).all(dim=1).nonzero().item()
            assert truth.gt_classes[row] == one_label


@both
def test_label_anchors_is_repeatable_and_leaves_no_trace(name):
    model, anchors = _model(name), None
    instances, anchors = [_batch()[0]["instances"]], _anchors(model, 128, 96)
    before = set(vars(model))
    with EventStorage() as storage:
        first = model.label_anchors(anchors, instances)
        second = model.label_anchors(anchors, instances)
        assert not storage.latest()
    for a, b in zip(first, second):
        assert torch.equal(a[0], b[0])
    assert set(vars(model)) == before
    assert instances[0].gt_classes.tolist() == [0, 2, 1]


@both
def test_image_without_boxes_is_all_background(name):
    model = _model(name)
    labels, boxes = model.label_anchors(_anchors(model, 64, 64), [_instances((64, 64), [], [])])
    assert (labels[0] == 3).all() and boxes[0].shape == (len(labels[0]), 4)


def _raw_losses(model, batch, change=None):
    """Losses by the model, its raw predictions (N, R, D), anchors, labels and boxes."""
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    features = [features[f] for f in model.head_in_features]
    predictions = model.head(features)
    if change is not None:
        predictions = change(predictions)
    truth = [x["instances"] for x in batch]
    with EventStorage() as storage:
        losses = model.forward_training(images, features, predictions, truth)
        scalars = {key: value for key, (value, _) in storage.latest().items()}
    dims = [3, model.box2box_transform.box_dim, 1][: len(predictions)]
    flat = [
        torch.cat([x.permute(0, 2, 3, 1).reshape(len(batch), -1, dim) for x in levels], dim=1)
        for levels, dim in zip(predictions, dims)
    ]
    anchors = model.anchor_generator(features)
    labels, boxes = model.label_anchors(anchors, truth)
    return losses, flat, Boxes.cat(anchors).tensor, labels, boxes, scalars


def _positives(labels):
    return [(n, r) for n, x in enumerate(labels) for r in range(len(x)) if 0 <= x[r] < 3]


def test_gfl_losses_one_anchor_at_a_time():
    model = _model("GFL")
    with torch.no_grad():  # otherwise all distributions are uniform
        model.head.bbox_pred.weight.mul_(30)
        model.head.cls_score.weight.mul_(30)
    losses, (logits, deltas), anchors, labels, boxes, scalars = _raw_losses(model, _batch())
    logits, deltas = logits.detach().double(), deltas.detach().double()
    positives = _positives(labels)
    box_sum = dfl_sum = weight_sum = cls_sum = iou_sum = 0.0
    quality = {}
    for n, r in positives:
        stride = (anchors[r, 2] - anchors[r, 0]).item() / 8
        cx, cy = ((anchors[r, :2] + anchors[r, 2:]) / 2).tolist()
        probabilities = deltas[n, r].view(4, 17).softmax(dim=1)
        left, top, right, bottom = ((probabilities * torch.arange(17)).sum(dim=1) * stride).tolist()
        decoded = torch.tensor([[cx - left, cy - top, cx + right, cy + bottom]])
        gt = boxes[n][r : r + 1].double()
        weight = logits[n, r].sigmoid().max().item()
        loss = giou_loss(decoded.double(), gt).item()
        low, high = torch.maximum(decoded, gt)[0, :2], torch.minimum(decoded, gt)[0, 2:]
        overlap = (high - low).clamp(min=0).prod().item()
        area = (left + right) * (top + bottom) + (gt[0, 2:] - gt[0, :2]).prod().item()
        quality[n, r] = overlap / (area - overlap)
        iou_sum += quality[n, r]
        x1, y1, x2, y2 = gt[0].tolist()
        for side, distance in enumerate((cx - x1, cy - y1, x2 - cx, y2 - cy)):
            y = min(max(distance / stride, 0.0), 15.9)
            low = int(y)
            dfl_sum -= weight * (low + 1 - y) * math.log(probabilities[side, low])
            dfl_sum -= weight * (y - low) * math.log(probabilities[side, low + 1])
        box_sum += weight * loss
        weight_sum += weight
    for n, label in enumerate(labels):
        for r in (label >= 0).nonzero().flatten().tolist():
            for k in range(3):
                p = logits[n, r, k].sigmoid().item()
                t = quality[n, r] if (n, r) in quality and label[r] == k else 0.0
                cls_sum -= abs(p - t) ** 2 * (t * math.log(p) + (1 - t) * math.log(1 - p))
    assert len(positives) >= 6
    expected = {
        "loss_gfl_cls": cls_sum / len(positives),
        "loss_gfl_box": 2.0 * box_sum / max(weight_sum, 1.0),
        "loss_gfl_dfl": 0.25 * dfl_sum / 4 / max(weight_sum, 1.0),
    }
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=2e-4)
    assert scalars["num_pos_anchors"] == len(positives) / 2
    assert scalars["gfl/mean_iou"] == pytest.approx(iou_sum / len(positives), rel=1e-3)


def test_atss_losses_one_anchor_at_a_time():
    model = _model("ATSS")
    with torch.no_grad():
        model.head.bbox_pred.weight.mul_(30)
        model.head.cls_score.weight.mul_(30)
        model.head.ctrness.weight.mul_(30)
    losses, raw, anchors, labels, boxes, scalars = _raw_losses(model, _batch())
    logits, deltas, ctrness = (x.detach().double() for x in raw)
    positives = _positives(labels)
    box_sum = ctr_sum = target_sum = cls_sum = 0.0
    for n, r in positives:
        side = (anchors[r, 2] - anchors[r, 0]).item()
        cx, cy = ((anchors[r, :2] + anchors[r, 2:]) / 2).tolist()
        dx, dy, dw, dh = (deltas[n, r] / torch.tensor([10.0, 10, 5, 5])).tolist()
        px, py, w, h = cx + dx * side, cy + dy * side, side * math.exp(dw), side * math.exp(dh)
        decoded = torch.tensor([[px - w / 2, py - h / 2, px + w / 2, py + h / 2]]).double()
        gt = boxes[n][r : r + 1].double()
        x1, y1, x2, y2 = gt[0].tolist()
        across, down = sorted((cx - x1, x2 - cx)), sorted((cy - y1, y2 - cy))
        target = math.sqrt(across[0] / across[1] * down[0] / down[1])
        p = ctrness[n, r, 0].sigmoid().item()
        ctr_sum -= target * math.log(p) + (1 - target) * math.log(1 - p)
        box_sum += target * giou_loss(decoded, gt).item()
        target_sum += target
    for n, label in enumerate(labels):
        for r in (label >= 0).nonzero().flatten().tolist():
            for k in range(3):
                p = logits[n, r, k].sigmoid().item()
                if label[r] == k:
                    cls_sum -= 0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    cls_sum -= 0.75 * p**2 * math.log(1 - p)
    assert len(positives) >= 6
    expected = {
        "loss_atss_cls": cls_sum / len(positives),
        "loss_atss_box": 2.0 * box_sum / max(target_sum, 1.0),
        "loss_atss_ctr": ctr_sum / len(positives),
    }
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected, rel=2e-4)
    assert scalars["num_pos_anchors"] == len(positives) / 2
    assert scalars["atss/mean_centerness"] == pytest.approx(target_sum / len(positives), rel=1e-3)


def test_centerness_target_worked_out_by_hand():
    anchor = torch.tensor([[-8.0, -8.0, 8.0, 8.0]])
    target = ATSS.centerness_targets(anchor, torch.tensor([[-1.0, -2.0, 3.0, 2.0]]))
    assert target.item() == pytest.approx(0.577350, abs=2e-6)


@both
def test_padding_to_other_images_has_no_part_in_the_losses(name):
    def disturb(predictions):
        # Image 1 has 12 x 8 valid cells on p3, of 16 x 12.
        predictions[0][0] = predictions[0][0].clone()
        predictions[0][0][1, :, 12:] = 30.0
        predictions[0][0][1, :, :, 8:] = 30.0
        return predictions

    model, batch = _model(name), _batch()
    plain, disturbed = _raw_losses(model, batch)[0], _raw_losses(model, batch, disturb)[0]
    for key in plain:
        torch.testing.assert_close(plain[key], disturbed[key], rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("sizes", [((64, 64), (64, 64)), ((97, 33), (50, 111))])
def test_batches_without_boxes_give_finite_connected_losses(name, sizes):
    model = _model(name)
    with EventStorage():
        losses = model([_image(size, seed=i) for i, size in enumerate(sizes)])
        assert get_event_storage().latest()["num_pos_anchors"][0] == 0
    assert set(losses) == LOSS_NAMES[name]
    for key, loss in losses.items():
        assert torch.isfinite(loss) and loss.requires_grad
        assert (loss.item() == 0) == (not key.endswith("_cls"))
    sum(losses.values()).backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), path


@both
def test_boxes_without_any_positive_anchor(name):
    model = _model(name)
    with EventStorage():
        losses = model([_image((64, 64), [[30.2, 30.2, 30.9, 30.9]], [1])])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert sum(loss.item() == 0 for loss in losses.values()) == 2


@both
def test_every_step_makes_the_same_collective_call(name, monkeypatch):
    module, shapes = {"GFL": gfl, "ATSS": atss}[name], []
    monkeypatch.setattr(module, "reduce_mean", lambda x: shapes.append((x.shape, x.dtype)) or x)
    model = _model(name)
    with EventStorage():
        model(_batch())
        model([_image((64, 64))])
    assert shapes == [(torch.Size([2]), torch.float32)] * 2


@both
def test_normalisers_are_means_over_processes(name, monkeypatch):
    """With twice the mean count all losses halve (the sums of weights are above 1 here)."""
    model, batch = _model(name, f"MODEL.{name}.PRIOR_PROB", 0.3), _batch()
    plain = _raw_losses(model, batch)[0]
    module = {"GFL": gfl, "ATSS": atss}[name]
    monkeypatch.setattr(module, "reduce_mean", lambda x: 2 * x)
    for key, loss in _raw_losses(model, batch)[0].items():
        torch.testing.assert_close(loss, plain[key] / 2)


@both
def test_gradients_reach_every_parameter(name):
    model = _model(name)
    boxes = [[0, 0, 127, 127], [2, 2, 40, 40], [50, 60, 110, 120], [70, 8, 90, 30]]
    with EventStorage():
        # Boxes much larger than the image occupy p5 to p7; those have factors as well.
        boxes += [[-60, -60, 190, 190], [-190, -190, 310, 310], [-500, -500, 520, 520]]
        sum(model([_image((128, 128), boxes, [0, 1, 2, 0, 1, 2, 0])]).values()).backward()
    without = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@both
def test_autocast_bf16_gives_finite_losses_near_those_of_fp32(name):
    model = _model(name)
    with EventStorage():
        model(_batch())
        plain = model(_batch())
        with torch.autocast("cpu", torch.bfloat16):
            half = model(_batch())
    for key, loss in half.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain[key], rtol=0.1, atol=1e-3)
    sum(half.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both
def test_gpu_gives_the_labels_and_losses_of_the_cpu(name):
    model = _model(name)
    losses, _, _, labels, boxes, _ = _raw_losses(model, _batch())
    batch = [{k: v.to("cuda") for k, v in sample.items()} for sample in _batch()]
    on_gpu, _, _, gpu_labels, gpu_boxes, _ = _raw_losses(model.to("cuda"), batch)
    for ours, theirs in zip(labels + boxes, gpu_labels + gpu_boxes):
        assert torch.equal(ours, theirs.cpu())
    for key, loss in on_gpu.items():
        torch.testing.assert_close(loss.cpu(), losses[key], rtol=2e-2, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            assert all(torch.isfinite(x) for x in _raw_losses(model, batch)[0].values())


def _detectable(name):
    # Scores around one half, and boxes that differ.
    model = _model(name, f"MODEL.{name}.PRIOR_PROB", 0.5).eval()
    with torch.no_grad():
        model.head.bbox_pred.weight.mul_(20)
        model.head.cls_score.weight.mul_(50)
    return model


@both
def test_inference_is_deterministic_and_leaves_raw_predictions_alone(name):
    model, batch, seen = _detectable(name), _batch(), []
    handle = model.head.register_forward_hook(
        lambda _, __, out: seen.extend((x, x.clone(), x._version) for y in out for x in y)
    )
    with torch.no_grad():
        first = [x["instances"] for x in model(batch)]
        handle.remove()
        second = [x["instances"] for x in model(batch)]
    assert len(seen) == 5 * (2 if name == "GFL" else 3)
    for tensor, copy, version in seen:
        assert tensor._version == version and torch.equal(tensor, copy)
    for a, b, sample in zip(first, second, batch):
        assert 0 < len(a) <= 100
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)
        assert a.image_size == sample["image"].shape[1:]
        assert (a.scores[:-1] >= a.scores[1:]).all()


@both
def test_scores_of_detections(name):
    model, image = _detectable(name), _batch()[:1]
    with torch.no_grad():
        images = model.preprocess_image(image)
        features = model.backbone(images.tensor)
        raw = model.head([features[f] for f in model.head_in_features])
        scores = torch.cat([x[0].permute(1, 2, 0).reshape(-1, 3) for x in raw[0]]).sigmoid()
        if name == "ATSS":
            ctr = torch.cat([x[0].permute(1, 2, 0).reshape(-1, 1) for x in raw[2]]).sigmoid()
            # Half of the class scores are below this; products near it are kept all the same.
            model.test_score_thresh = scores.median().item()
            allowed = (scores * ctr)[scores > model.test_score_thresh]
            assert (allowed < model.test_score_thresh).any()
        else:
            allowed = scores[scores > model.test_score_thresh]
        model.test_nms_thresh, model.max_detections_per_image = 1.0, 10**6
        found = model(image)[0]["instances"]
    # Boxes entirely outside of the image are dropped by the post-processing.
    assert 0 < len(found) <= len(allowed)
    distance = (found.scores[:, None] - allowed[None]).abs().amin(dim=1)
    assert distance.max() < 1e-6


@both
def test_high_threshold_gives_no_detections(name):
    model = _detectable(name)
    model.test_score_thresh = 1.1
    with torch.no_grad():
        assert len(model(_batch())[0]["instances"]) == 0


@both
def test_overfits_one_image(name):
    model = _model(name, f"MODEL.{name}.NUM_CLASSES", 2)
    pixels = torch.randint(0, 60, (3, 128, 128), generator=torch.Generator().manual_seed(0))
    pixels[:, 30:90, 24:104] += 180
    truth = torch.tensor([[24.0, 30.0, 104.0, 90.0]])
    batch = [{"image": pixels.byte(), "instances": _instances((128, 128), truth.tolist(), [1])}]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    with EventStorage():
        for _ in range(60):
            losses = model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            history.append(sum(losses.values()).item())
    assert history[-1] < 0.35 * history[0], history[::10]
    # One image: its own batch statistics are the ones the model was trained with.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    model.eval()
    with torch.no_grad():
        found = model(batch)[0]["instances"]
    assert len(found) > 0 and found.pred_classes[0] == 1
    box = found.pred_boxes.tensor[0]
    assert (box - truth[0]).abs().max() < 8, (box, found.scores[0])


@both
def test_base_config_is_the_official_recipe(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / f"Base-{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    head = model.head
    assert head.num_stages == 4 and head.cls_subnet[0].out_channels == 256
    assert (head.ctrness is not None) == (name == "ATSS") and len(head.scales) == 5
    assert model.backbone.top_block.in_feature == "p5"
    frozen = {k.split(".")[2] for k, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}
    solver = cfg.SOLVER
    assert (solver.BASE_LR, solver.WEIGHT_DECAY_NORM, solver.MAX_ITER) == (0.01, 1e-4, 90000)


@both
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("IN_FEATURES", ["p3", "p9"], "p9"),
        ("ANCHOR_SCALE", 0.0, "ANCHOR_SCALE"),
        ("ATSS_TOPK", 0, "ATSS_TOPK"),
        ("PRIOR_PROB", 0.0, "PRIOR_PROB"),
    ],
)
def test_user_errors_name_the_key(name, key, value, message):
    with pytest.raises(ValueError, match=message):
        _model(name, f"MODEL.{name}.{key}", value)


def test_user_errors_of_one_detector():
    with pytest.raises(ValueError, match="MODEL.GFL.QFL_BETA.*0.5"):
        _model("GFL", "MODEL.GFL.QFL_BETA", 0.5)
    with pytest.raises(ValueError, match="REG_MAX.*0"):
        _model("GFL", "MODEL.GFL.REG_MAX", 0)
    with pytest.raises(ValueError, match="MODEL.ATSS.BBOX_REG_WEIGHTS"):
        _model("ATSS", "MODEL.ATSS.BBOX_REG_WEIGHTS", (1.0, 1.0))
