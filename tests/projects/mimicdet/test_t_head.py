"""The T-head: levels, branches, losses and detections against loops and Detectron2's own parts."""

import math

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_roi_heads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torchvision.ops import roi_align

from kd_d2.config import get_cfg
from kd_d2.projects.mimicdet.pooler import LevelROIPooler
from tests.projects.mimicdet.head_cases import (
    FEATURE_DIM,
    IMAGE_SIZE,
    NUM_CLASSES,
    T_STRIDES,
    proposals,
    pyramid,
    t_head,
)


@pytest.fixture(autouse=True)
def storage():
    with EventStorage() as storage:
        yield storage


def _boxes_of_side(*sides):
    result = Instances((600, 600))
    result.proposal_boxes = Boxes(torch.tensor([[10.0, 20, 10 + s, 20 + s] for s in sides]))
    return result


def _paper_pooler(level_assign):
    return LevelROIPooler(
        output_size=7,
        scales=[1 / s for s in (4, 8, 16, 32, 64)],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
        level_assign=level_assign,
    )


def test_levels_of_boxes():
    boxes = _boxes_of_side(100, 130, 512)
    # Detectron2's rule: P2, P3, P5; born on P4, P5, P7: P3, P4, P6
    assert _paper_pooler("area").levels([boxes]).tolist() == [0, 1, 3]
    boxes.level = torch.tensor([1, 2, 4])
    assert _paper_pooler("origin").levels([boxes]).tolist() == [1, 2, 4]
    with pytest.raises(ValueError, match="T_HEAD.LEVEL_ASSIGN .*'area', 'origin'.*'iou'"):
        _paper_pooler("iou")


@pytest.mark.parametrize("level_assign", ["origin", "area"])
def test_pooling_against_a_loop_over_boxes(level_assign):
    pooler = t_head(level_assign=level_assign).pooler
    features, boxes = pyramid(T_STRIDES), proposals([6, 0, 5])
    features = [torch.cat([x, x[:1] + 1]) for x in features]
    if level_assign == "area":
        # sides 10 to 32 would all go to the finest level: 224 pixels at entry 2 of the list
        boxes[0].proposal_boxes.scale(5, 5)
    pooled, levels = pooler(features, boxes), pooler.levels(boxes)
    assert len(set(levels.tolist())) > 1
    row = 0
    for image, instances in enumerate(boxes):
        for box in instances.proposal_boxes.tensor:
            if level_assign == "origin":
                level = instances.level[row - sum(map(len, boxes[:image]))].item()
            else:
                side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
                level = min(max(math.floor(4 + math.log2(side / 224)), 2), 4) - 2
            assert levels[row] == level
            maps = features[level][image][None]
            expected = roi_align(maps, [box[None]], 4, 1 / T_STRIDES[level], 0, aligned=True)
            torch.testing.assert_close(pooled[row], expected[0])
            row += 1
    assert row == len(pooled) == 11


def test_every_level_gets_a_gradient_even_without_boxes():
    features, boxes = pyramid(T_STRIDES, requires_grad=True), proposals([4, 3])
    for instances in boxes:
        instances.level.fill_(1)
    t_head().pooler(features, boxes).sum().backward()
    assert [bool(x.grad.any()) for x in features] == [False, True, False]


def test_half_precision_does_not_round_boxes():
    pooler, boxes = t_head().pooler, proposals([6, 5])
    for instances in boxes:
        instances.proposal_boxes.tensor.add_(0.37)
    features = [x.bfloat16() for x in pyramid(T_STRIDES)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pooler(features, boxes)
    torch.testing.assert_close(pooled, pooler([x.float() for x in features], boxes))


def _reference(head, branch, pooled):
    """Vectors before the last ReLU by the branch's weights, layer by layer."""
    weights = dict(branch.named_parameters())
    x = pooled
    for name in sorted({name.split(".")[0] for name in weights if name.startswith("conv")}):
        x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).relu()
    x = x.flatten(1)
    for i, name in enumerate(sorted({n.split(".")[0] for n in weights if n.startswith("fc")})):
        x = x.relu() if i else x
        x = x @ weights[f"{name}.weight"].t() + weights[f"{name}.bias"]
    return x


@pytest.mark.parametrize(
    "variant, layers",
    [("dual", [(0, 2), (4, 1)]), ("light", [(0, 2)]), ("heavy", [(4, 2)])],
)
def test_features_and_predictions(variant, layers):
    head = t_head(variant)
    for branch, (num_convs, num_fcs) in zip(head.branches, layers, strict=True):
        assert (len(branch.conv_norm_relus), len(branch.fcs)) == (num_convs, num_fcs)
    features, boxes = pyramid(T_STRIDES), proposals([4, 3])
    output = head.features(features, boxes)
    pooled = head.pooler(features, boxes)
    vectors = [_reference(head, branch, pooled) for branch in head.branches]
    torch.testing.assert_close(output.cls_feature, vectors[0])
    torch.testing.assert_close(output.reg_feature, vectors[-1])
    assert (output.cls_feature < 0).any() and output.cls_feature.shape == (7, FEATURE_DIM)
    assert (variant == "dual") is not torch.equal(output.cls_feature, output.reg_feature)
    # what Detectron2's head returns is the rectified vector
    torch.testing.assert_close(head.branches[0](pooled), vectors[0].relu())
    cls_score, bbox_pred = head.predictor.cls_score, head.predictor.bbox_pred
    torch.testing.assert_close(output.logits, cls_score(vectors[0].relu()))
    torch.testing.assert_close(output.deltas, bbox_pred(vectors[-1].relu()))
    assert output.logits.shape == (7, NUM_CLASSES + 1) and output.deltas.shape == (7, 4)


def test_losses_against_a_loop():
    head, boxes = t_head(), proposals([6, 5])
    output = head.features(pyramid(T_STRIDES), boxes)
    losses = head.losses(output, boxes)
    assert set(losses) == {"loss_t_cls", "loss_t_reg"}
    cross_entropy, distance, row = 0.0, 0.0, 0
    for instances in boxes:
        for i in range(len(instances)):
            y = instances.gt_classes[i]
            cross_entropy -= output.logits[row].log_softmax(0)[y].item()
            if y < NUM_CLASSES:
                x0, y0, x1, y1 = instances.proposal_boxes.tensor[i].tolist()
                a0, b0, a1, b1 = instances.gt_boxes.tensor[i].tolist()
                target = (
                    10 * ((a0 + a1) / 2 - (x0 + x1) / 2) / (x1 - x0),
                    10 * ((b0 + b1) / 2 - (y0 + y1) / 2) / (y1 - y0),
                    5 * math.log((a1 - a0) / (x1 - x0)),
                    5 * math.log((b1 - b0) / (y1 - y0)),
                )
                distance += sum(abs(t - p) for t, p in zip(target, output.deltas[row].tolist()))
            row += 1
    assert distance > 0
    assert losses["loss_t_cls"].item() == pytest.approx(cross_entropy / 11, rel=1e-5)
    assert losses["loss_t_reg"].item() == pytest.approx(distance / 11, rel=1e-5)


def test_target_of_the_second_regression():
    boxes = _boxes_of_side(1)
    boxes.proposal_boxes = Boxes(torch.tensor([[36.0, 24, 84, 56]]))
    boxes.gt_boxes = Boxes(torch.tensor([[40.0, 20, 88, 60]]))
    boxes.gt_classes = torch.tensor([1])
    head = t_head()
    target = torch.tensor([[0.8333, 0, 0, 1.1157]])
    torch.testing.assert_close(
        head.predictor.box2box_transform.get_deltas(
            boxes.proposal_boxes.tensor, boxes.gt_boxes.tensor
        ),
        target,
        atol=1e-4,
        rtol=0,
    )
    boxes.level = torch.tensor([0])
    output = head.features(pyramid(T_STRIDES, num_images=1), [boxes])
    perfect = output._replace(deltas=target)
    assert head.losses(perfect, [boxes])["loss_t_reg"].item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("variant", ["dual", "light", "heavy"])
@pytest.mark.parametrize("counts", [[0, 0], [4, 0], [4, 3]])
def test_no_boxes_or_no_positives(variant, counts):
    head = t_head(variant)
    features, boxes = pyramid(T_STRIDES, requires_grad=True), proposals(counts, positives=0.0)
    losses = head.losses(head.features(features, boxes), boxes)
    assert losses["loss_t_reg"].item() == 0
    assert (losses["loss_t_cls"].item() == 0) == (sum(counts) == 0)
    sum(losses.values()).backward()
    for x in (*features, *head.parameters()):
        assert x.grad is not None and x.grad.isfinite().all()
    detections = head.eval().inference(features, boxes)
    assert [len(x) > 0 for x in detections] == [count > 0 for count in counts]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["dual", "heavy"])
def test_half_precision(dtype, variant):
    head, boxes = t_head(variant), proposals([6, 5])
    features = pyramid(T_STRIDES)
    half = [x.to(dtype).requires_grad_() for x in features]
    with torch.autocast("cpu", dtype=dtype):
        output = head.features(half, boxes)
        losses = head.losses(output, boxes)
    sum(losses.values()).backward()
    assert all(x.dtype is torch.float32 for x in (*output, *losses.values()))
    assert all(x.grad.isfinite().all() for x in (*half, *head.parameters()))
    expected = head.features(features, boxes)
    torch.testing.assert_close(output.cls_feature, expected.cls_feature, atol=0.1, rtol=0.1)


def test_detections():
    head, boxes = t_head().eval(), proposals([6, 5])
    features = pyramid(T_STRIDES)
    found = head.inference(features, boxes)
    output = head.features(features, boxes)
    assert [x.image_size for x in found] == [IMAGE_SIZE] * 2
    # logits are near 0: every box counts in every class, and the best one survives suppression
    scores = output.logits.softmax(1)[:, :-1].split([6, 5])
    decoded = head.predictor.box2box_transform.apply_deltas(
        output.deltas, torch.cat([x.proposal_boxes.tensor for x in boxes])
    ).split([6, 5])
    for detections, image_scores, image_boxes in zip(found, scores, decoded):
        assert detections.scores[0] == image_scores.max()
        best = divmod(int(image_scores.argmax()), NUM_CLASSES)
        assert detections.pred_classes[0] == best[1]
        expected = Boxes(image_boxes[best[0]][None].clone())
        expected.clip(IMAGE_SIZE)
        torch.testing.assert_close(detections.pred_boxes.tensor[0], expected.tensor[0])


def test_interface_of_detectron2():
    """Labels, samples and losses by itself in training, detections otherwise."""
    head, boxes = t_head(), proposals([30, 20])
    features = dict(zip(("p2", "p3", "p4"), pyramid(T_STRIDES)))
    images = ImageList(torch.zeros(2, 3, *IMAGE_SIZE), [IMAGE_SIZE] * 2)
    targets = [Instances(IMAGE_SIZE), Instances(IMAGE_SIZE)]
    targets[0].gt_boxes = Boxes(boxes[0].proposal_boxes.tensor[:3].clone())
    targets[0].gt_classes = torch.tensor([0, 1, 2])
    targets[1].gt_boxes = Boxes(torch.zeros(0, 4))
    targets[1].gt_classes = torch.zeros(0, dtype=torch.int64)
    for instances in boxes:
        instances.remove("gt_classes")
        instances.remove("gt_boxes")
    sampled, losses = head(images, features, boxes, targets)
    assert [len(x) for x in sampled] == [8, 8]
    assert (sampled[0].gt_classes < NUM_CLASSES).sum() == 2  # a quarter
    assert (sampled[1].gt_classes == NUM_CLASSES).all()
    assert set(losses) == {"loss_t_cls", "loss_t_reg"} and losses["loss_t_reg"] > 0
    detections, losses = head.eval()(images, features, boxes)
    assert not losses and all(x.has("pred_boxes") for x in detections)


def _paper_cfg(**overrides) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.RPN.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.ROI_HEADS.NAME = "MimicTHead"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.merge_from_list([part for item in overrides.items() for part in item])
    return cfg


def _paper_head(**overrides):
    shapes = {f"p{i}": ShapeSpec(channels=256, stride=2**i) for i in range(2, 8)}
    with torch.device("meta"):
        return build_roi_heads(_paper_cfg(**overrides), shapes)


@pytest.mark.parametrize(
    "variant, millions", [("dual", 29.189), ("light", 13.983), ("heavy", 16.343)]
)
def test_number_of_parameters_with_256_channels(variant, millions):
    head = _paper_head(**{"MODEL.MIMICDET.T_HEAD.VARIANT": variant})
    assert sum(x.numel() for x in head.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)
    assert head.in_features == ["p2", "p3", "p4", "p5", "p6"]
    assert [x.spatial_scale for x in head.pooler.level_poolers] == [2**-i for i in range(2, 7)]


def test_initial_probability_of_an_object():
    cfg = _paper_cfg(**{"MODEL.MIMICDET.T_HEAD.PRIOR_PROB": 0.2, "MODEL.ROI_HEADS.NUM_CLASSES": 4})
    cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
    head = build_roi_heads(cfg, {f"p{i}": ShapeSpec(channels=8, stride=2**i) for i in range(2, 8)})
    expected = torch.tensor([0.05] * 4 + [0.8])
    torch.testing.assert_close(head.predictor.cls_score.bias.softmax(dim=0), expected)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False, "CLS_AGNOSTIC_BBOX_REG is False"),
        ("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3"], r"ROI_HEADS.IN_FEATURES \['p2', 'p3'\]"),
        ("MODEL.MIMICDET.T_HEAD.VARIANT", "big", "T_HEAD.VARIANT .*'dual', 'heavy', 'light'.*big"),
        ("MODEL.MIMICDET.T_HEAD.PRIOR_PROB", 1.0, r"T_HEAD.PRIOR_PROB must be in \[0, 1\)"),
    ],
)
def test_bad_values_name_the_key(key, value, message):
    with pytest.raises(ValueError, match=message):
        _paper_head(**{key: value})
