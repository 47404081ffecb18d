"""SSD as a whole detector: specification's numbers, torchvision's SSD, and small images."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torchvision.models.detection.ssd import SSD as TorchvisionSSD
from torchvision.ops import box_iou, nms

from kd_d2.config import get_cfg
from kd_d2.modeling.layers import DefaultBoxGenerator
from kd_d2.modeling.meta_arch import SSD
from tests.fixtures import tiny_batch, tiny_cfg, tiny_model

CONFIGS = Path(__file__).parents[3] / "configs"
SIDES = {300: (38, 19, 10, 5, 3, 1), 512: (64, 32, 16, 8, 4, 2, 1)}
SQUARE = ((128, 128),)


def _published(size):
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / f"Base-SSD{size}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


@pytest.fixture(scope="module")
def ssd300():
    return _published(300)


def _instances(boxes, classes, size=(300, 300)):
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def _anchors(sides, generator):
    return generator([torch.zeros(1, 1, side, side) for side in sides])


# ------------------------------------------------------------------------ the published networks
@pytest.mark.slow
@pytest.mark.parametrize("size, count, boxes", [(300, 34305206, 8732), (512, 36038196, 24564)])
def test_published_networks(size, count, boxes):
    model = _published(size)
    assert isinstance(model, SSD) and model.input_size == size
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert model.backbone.map_sizes(size) == SIDES[size]
    assert sum(len(x) for x in _anchors(SIDES[size], model.anchor_generator)) == boxes
    assert model.max_detections_per_image == 200 and model.num_classes == 80
    head = model.head
    bound = math.sqrt(6 / (9 * (512 + head.cls_score[0].out_channels)))  # Xavier uniform
    assert 0.99 * bound < head.cls_score[0].weight.abs().max() <= bound
    assert all((conv.bias == 0).all() for conv in (*head.cls_score, *head.bbox_pred))


@pytest.mark.parametrize(
    "boxes, positives, box_loss",
    [
        ([[50, 60, 180, 220]], 7, 2.438897),
        ([[100, 100, 110, 110]], 1, 10.181278),
        ([[0, 0, 30, 30], [120, 130, 160, 200], [50, 60, 180, 220]], 18, 2.453534),
    ],
)
def test_losses_of_zero_predictions(ssd300, boxes, positives, box_loss):
    """Numbers of the specification; three copies of the image have the same mean."""
    anchors = _anchors(SIDES[300], ssd300.anchor_generator)
    for copies in (1, 3):
        truth = [_instances(boxes, list(range(len(boxes))))] * copies
        labels, matched = ssd300.label_anchors(anchors, truth)
        assert [(x < 80).sum().item() for x in labels] == [positives] * copies
        logits = [torch.zeros(copies, len(x), 81) for x in anchors]
        deltas = [torch.zeros(copies, len(x), 4) for x in anchors]
        with EventStorage() as storage:
            losses = ssd300.losses(anchors, logits, deltas, labels, matched)
            assert storage.latest()["num_pos_anchors"][0] == positives
        assert losses["loss_ssd_cls"].item() == pytest.approx(17.577797, abs=2e-5)
        assert losses["loss_ssd_box"].item() == pytest.approx(box_loss, abs=2e-5)


# ------------------------------------------------------------------------ torchvision's SSD
class _Outputs(torch.nn.Module):
    """Backbone or head of torchvision's SSD that returns what it was given."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *_):
        return self.value


@pytest.fixture(scope="module")
def random_outputs():
    """Anchors, logits (background last), deltas and ground truth of two images of 300 pixels."""
    generator = torch.Generator().manual_seed(0)
    boxes = DefaultBoxGenerator(
        sizes=(21, 45, 99, 153, 207, 261, 315),
        aspect_ratios=((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
        strides=(8, 16, 32, 64, 100, 300),
    )
    anchors = _anchors(SIDES[300], boxes)
    logits = [torch.randn(2, len(x), 4, generator=generator) * 2 for x in anchors]
    deltas = [torch.randn(2, len(x), 4, generator=generator) for x in anchors]
    truth = [
        _instances([[50, 60, 180, 220], [5, 5, 60, 40]], [0, 2]),
        _instances([[100, 20, 290, 280]], [1]),
    ]
    return anchors, logits, deltas, truth


def _oracle(anchors, logits, deltas, **kwargs):
    """torchvision's SSD around given outputs; its background is class 0."""
    moved = torch.cat([x.roll(1, dims=2) for x in logits], dim=1)
    outputs = {"cls_logits": moved, "bbox_regression": torch.cat(deltas, dim=1)}
    backbone = _Outputs({"0": torch.zeros(2, 1, 1, 1)})
    boxes = _Outputs([Boxes.cat(anchors).tensor] * 2)
    model = TorchvisionSSD(
        backbone, boxes, (300, 300), num_classes=4, head=_Outputs(outputs), **kwargs
    )
    return model, outputs


def test_losses_equal_torchvision(random_outputs):
    """Its divisor is the number of positives, ours too where each image has one."""
    anchors, logits, deltas, truth = random_outputs
    model = tiny_model("SSD")
    labels, matched = model.label_anchors(anchors, truth)
    with EventStorage():
        ours = model.losses(anchors, logits, deltas, labels, matched)

    oracle, outputs = _oracle(anchors, logits, deltas)
    targets = [{"boxes": x.gt_boxes.tensor, "labels": x.gt_classes + 1} for x in truth]
    stacked = Boxes.cat(anchors).tensor
    matches = [oracle.proposal_matcher(box_iou(x["boxes"], stacked)) for x in targets]
    theirs = oracle.compute_loss(targets, outputs, [stacked] * 2, matches)
    torch.testing.assert_close(ours["loss_ssd_cls"], theirs["classification"])
    torch.testing.assert_close(ours["loss_ssd_box"], theirs["bbox_regression"])


def test_detections_equal_torchvision_where_both_keep_everything(random_outputs):
    anchors, logits, deltas, _ = random_outputs
    model = tiny_model("SSD").eval()
    model.test_score_thresh, model.test_topk_candidates = 0.6, 100000
    model.max_detections_per_image = 200
    oracle, outputs = _oracle(
        anchors, logits, deltas, score_thresh=0.6, nms_thresh=0.45, detections_per_img=200
    )
    oracle.topk_candidates = 100000
    theirs = oracle.postprocess_detections(
        outputs, [Boxes.cat(anchors).tensor] * 2, [(300, 300)] * 2
    )
    for image, other in enumerate(theirs):
        scores = [x[image].softmax(dim=1)[:, :-1] for x in logits]
        found = model.inference_single_image(
            anchors, scores, [x[image] for x in deltas], (300, 300)
        )
        assert len(found) == len(other["scores"]) > 50
        torch.testing.assert_close(found.scores, other["scores"])
        torch.testing.assert_close(found.pred_boxes.tensor, other["boxes"], rtol=0, atol=2e-3)
        assert torch.equal(found.pred_classes, other["labels"] - 1)


# ------------------------------------------------------------------------ losses
def test_divisor_counts_images_without_positives_as_one():
    """Per image sums S1 (n = 2), S2 (n = 0): divided by 2 + 1, not by 2."""
    model = tiny_model("SSD")
    anchors = _anchors((16, 8, 4, 2, 1), model.anchor_generator)
    total = sum(len(x) for x in anchors)
    labels, boxes = torch.full((2, total), 3), torch.zeros(2, total, 4)
    labels[0, [5, 40]] = torch.tensor([0, 2])
    boxes[0, [5, 40]] = Boxes.cat(anchors).tensor[[5, 40]]
    logits = [torch.zeros(2, len(x), 4) for x in anchors]
    deltas = [torch.full((2, len(x), 4), 2.0) for x in anchors]
    with EventStorage():
        losses = model.losses(anchors, logits, deltas, list(labels), list(boxes))
    assert losses["loss_ssd_cls"].item() == pytest.approx(8 * math.log(4) / 3, rel=1e-5)
    # smooth L1 of an error of 2: 1.5, four deltas, two positives
    assert losses["loss_ssd_box"].item() == pytest.approx(12 / 3, rel=1e-5)


def test_weights_and_beta_of_the_losses():
    changes = {
        "MODEL.SSD.CLS_LOSS_WEIGHT": 0.5,
        "MODEL.SSD.BOX_LOSS_WEIGHT": 3.0,
        "MODEL.SSD.NEG_POS_RATIO": 1.0,
        "MODEL.SSD.SMOOTH_L1_BETA": 4.0,
    }
    model = build_model(tiny_cfg("SSD", **changes))
    anchors = _anchors((16, 8, 4, 2, 1), model.anchor_generator)
    total = sum(len(x) for x in anchors)
    labels, boxes = torch.full((1, total), 3), torch.zeros(1, total, 4)
    labels[0, 9], boxes[0, 9] = 1, Boxes.cat(anchors).tensor[9]
    logits = [torch.zeros(1, len(x), 4) for x in anchors]
    deltas = [torch.full((1, len(x), 4), 2.0) for x in anchors]
    with EventStorage():
        losses = model.losses(anchors, logits, deltas, list(labels), list(boxes))
    assert losses["loss_ssd_cls"].item() == pytest.approx(0.5 * 2 * math.log(4), rel=1e-5)
    assert losses["loss_ssd_box"].item() == pytest.approx(3 * 4 * (0.5 * 4 / 4), rel=1e-5)


@pytest.mark.parametrize("num_gt", [0, (0, 2)])
def test_images_without_ground_truth(num_gt):
    model = tiny_model("SSD")
    with EventStorage():
        losses = model(tiny_batch(sizes=SQUARE, num_gt=num_gt))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    nothing = num_gt == 0
    assert all((loss == 0) == nothing for loss in losses.values())
    assert (sum(p.grad.abs().sum() for p in model.parameters()) == 0) == nothing


def test_labels_are_repeatable_and_per_image():
    model = tiny_model("SSD")
    truth = [x["instances"] for x in tiny_batch(sizes=SQUARE, num_gt=(3, 0))]
    anchors = _anchors((16, 8, 4, 2, 1), model.anchor_generator)
    labels, boxes = model.label_anchors(anchors, truth)
    again = model.label_anchors(anchors, truth)
    assert torch.equal(labels[0], again[0][0]) and torch.equal(boxes[0], again[1][0])
    assert (labels[1] == 3).all() and (boxes[1] == 0).all()
    positive = labels[0] < 3
    assert positive.sum() >= 3
    for label, box in zip(labels[0][positive], boxes[0][positive]):
        row = (truth[0].gt_boxes.tensor == box).all(dim=1).nonzero()[0, 0]
        assert truth[0].gt_classes[row] == label


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_is_finite_and_near_fp32(dtype):
    model = tiny_model("SSD")
    batch = tiny_batch(sizes=SQUARE)
    with EventStorage():
        exact = model(batch)
        with torch.autocast("cpu", dtype=dtype):
            losses = model(batch)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.05)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ------------------------------------------------------------------------ inference
def _naive_detections(model, batch):
    """Another formulation of inference, in loops, from the network's raw outputs in training."""
    model.train()
    images = model.preprocess_image(batch)
    with torch.no_grad():
        logits, deltas = model.head(list(model.backbone(images.tensor).values()))
    model.eval()
    anchors = model.anchor_generator(logits)
    results = []
    for image in range(len(batch)):
        candidates = []
        for level in range(len(logits)):
            boxes = anchors[level].tensor
            cells = logits[level].shape[-2:]
            per_cell = len(boxes) // (cells[0] * cells[1])
            rows = []
            for row, anchor in enumerate(boxes):
                y, x = divmod(row // per_cell, cells[1])
                first = row % per_cell
                z = logits[level][image, first * 4 : first * 4 + 4, y, x]
                d = deltas[level][image, first * 4 : first * 4 + 4, y, x]
                rows.append((z.softmax(dim=0)[:3], d, anchor))
            rows.sort(key=lambda item: -item[0].max().item())
            candidates += rows[: model.test_topk_candidates]
        kept = []
        for category in range(3):
            boxes, scores = [], []
            for p, (dx, dy, dw, dh), (x1, y1, x2, y2) in candidates:
                if p[category] > model.test_score_thresh:
                    w, h = x2 - x1, y2 - y1
                    cx, cy = (x1 + x2) / 2 + dx / 10 * w, (y1 + y2) / 2 + dy / 10 * h
                    limit = math.log(1000 / 16)
                    w = w * torch.exp((dw / 5).clamp(max=limit))
                    h = h * torch.exp((dh / 5).clamp(max=limit))
                    box = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
                    boxes.append(box.clamp(0, 128))
                    scores.append(p[category])
            if boxes:
                boxes, scores = torch.stack(boxes), torch.stack(scores)
                for i in nms(boxes, scores, model.test_nms_thresh).tolist():
                    kept.append((scores[i].item(), category, boxes[i]))
        kept.sort(key=lambda item: -item[0])
        results.append(kept[: model.max_detections_per_image])
    return results


@pytest.mark.parametrize("topk, limit", [(1000, 200), (7, 20)])
def test_inference_equals_loops_over_the_raw_outputs_of_training(topk, limit):
    model = tiny_model("SSD")
    model.test_score_thresh, model.test_topk_candidates = 0.3, topk
    model.max_detections_per_image = limit
    batch = tiny_batch(sizes=SQUARE)
    expected = _naive_detections(model, batch)
    with torch.no_grad():
        found = model.eval()(batch)
    for wanted, result in zip(expected, found):
        instances = result["instances"]
        # boxes without area after clipping are dropped at the very end
        wanted = [x for x in wanted if (x[2][2:] > x[2][:2]).all()]
        assert len(instances) == len(wanted) > 5
        torch.testing.assert_close(instances.scores, torch.tensor([s for s, _, _ in wanted]))
        assert instances.pred_classes.tolist() == [c for _, c, _ in wanted]
        boxes = torch.stack([b for _, _, b in wanted])
        torch.testing.assert_close(instances.pred_boxes.tensor, boxes, rtol=1e-4, atol=1e-3)


def test_other_sizes_are_stretched_and_boxes_go_back():
    model = tiny_model("SSD").eval()
    model.test_score_thresh = 0.3
    (wide,) = tiny_batch(1, sizes=((96, 200),))
    square = F.interpolate(
        wide["image"][None].float(), size=(128, 128), mode="bilinear", align_corners=False
    )[0]
    with torch.no_grad():
        (ours,) = model([wide])
        (theirs,) = model([{"image": square, "height": 128, "width": 128}])
    ours, theirs = ours["instances"], theirs["instances"]
    assert ours.image_size == (96, 200) and len(ours) > 5
    assert torch.equal(ours.scores, theirs.scores)
    scale = torch.tensor([200 / 128, 96 / 128] * 2)
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor * scale)


def test_predictor_that_keeps_the_aspect_ratio_reports_original_pixels():
    """Detectron2's default predictor resizes first; height and width are the original's."""
    model = tiny_model("SSD").eval()
    model.test_score_thresh = 0.3
    (record,) = tiny_batch(1, sizes=((60, 120),))
    with torch.no_grad():
        (same,) = model([record])
        (twice,) = model([{**record, "height": 120, "width": 240}])
    torch.testing.assert_close(
        twice["instances"].pred_boxes.tensor, 2 * same["instances"].pred_boxes.tensor
    )


def test_mixed_sizes_in_one_batch_equal_single_images():
    model = tiny_model("SSD").eval()
    batch = tiny_batch(2, sizes=((128, 128), (90, 61)))
    with torch.no_grad():
        together, alone = model(batch), [model([x])[0] for x in batch]
    for a, b in zip(together, alone):
        assert len(a["instances"]) == len(b["instances"])
        torch.testing.assert_close(a["instances"].scores, b["instances"].scores)


def test_training_on_another_size_is_refused():
    with pytest.raises(ValueError, match="128x128 .* got 96x112; set INPUT.MAPPER"):
        tiny_model("SSD")(tiny_batch())


def test_raw_predictions_are_left_alone_by_inference():
    model = tiny_model("SSD").eval()
    images = model.preprocess_image(tiny_batch(sizes=SQUARE))
    with torch.no_grad():
        features = list(model.backbone(images.tensor).values())
        predictions = model.head(features)
        before = [[x.clone() for x in levels] for levels in predictions]
        model.forward_inference(images, features, predictions)
    assert all(torch.equal(a, b) for x, y in zip(predictions, before) for a, b in zip(x, y))


# ------------------------------------------------------------------------ configuration
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"MODEL.SSD.INPUT_SIZE": 20, "MODEL.SSD_VGG.EXTRAS": ((8, 8, 3, 1, 0),) * 3}, "too small"),
        ({"MODEL.SSD.STRIDES": (8, 16)}, "MODEL.SSD.STRIDES has 2 entries"),
        ({"MODEL.SSD.SIZES": (16, 28)}, "SIZES needs 6 entries"),
        ({"MODEL.SSD.NEG_POS_RATIO": -1.0}, "NEG_POS_RATIO must not be negative"),
        ({"MODEL.SSD.IOU_THRESH": 0.0}, "IOU_THRESH"),
    ],
)
def test_configs_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(tiny_cfg("SSD", **changes))


def test_any_backbone_can_be_used():
    changes = {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4"],
        "MODEL.SSD.STRIDES": (8, 16),
        "MODEL.SSD.SIZES": (16, 40, 90),
        "MODEL.SSD.ASPECT_RATIOS": ((2,), (2, 3)),
    }
    model = build_model(tiny_cfg("SSD", **changes))
    with EventStorage():
        losses = model(tiny_batch(sizes=SQUARE))
    assert set(losses) == {"loss_ssd_cls", "loss_ssd_box"}
