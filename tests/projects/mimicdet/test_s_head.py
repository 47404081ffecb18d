"""The S-head: predictions of boxes, losses and detections against loops and hand-made numbers."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances

from kd_d2.config import get_cfg
from kd_d2.projects.mimicdet.outputs import HeadOutput
from kd_d2.projects.mimicdet.rows import hardest_rows
from kd_d2.projects.mimicdet.s_head import MimicSHead
from tests.projects.mimicdet.head_cases import (
    FEATURE_DIM,
    NUM_CLASSES,
    S_STRIDES,
    WEIGHTS,
    cell_of,
    proposals,
    pyramid,
    s_head,
)


def _inputs(**options):
    return pyramid(S_STRIDES, **options), pyramid(S_STRIDES, channels=4, seed=1, **options)


def _output(boxes, logits=None, deltas=None):
    """Predictions for boxes: given ones or random ones."""
    count = sum(map(len, boxes))
    torch.manual_seed(5)
    feature = torch.zeros(count, FEATURE_DIM)
    logits = torch.randn(count, NUM_CLASSES + 1) if logits is None else logits
    deltas = torch.randn(count, 4) if deltas is None else deltas
    return HeadOutput(feature, feature, logits.requires_grad_(), deltas.requires_grad_())


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("gather_first", [True, False])
def test_predictions_are_those_of_the_cell_of_each_box(split, gather_first):
    head = s_head(split=split, gather_first=gather_first)
    boxes = proposals([7, 5])
    aligned = head(*_inputs())
    output = head.predict(aligned, boxes)
    row = 0
    for image, instances in enumerate(boxes):
        for index in instances.anchor_index.tolist():
            level, y, x = cell_of(index)
            cell = aligned[level][image, :, y, x]
            assert (cell >= 0).all()
            features = [p.weight[:, :, 0, 0] @ cell + p.bias for p in head.projections]
            weight, bias = head.cls_score.weight[:, :, 0, 0], head.cls_score.bias
            logits = weight @ features[0].relu() + bias
            weight, bias = head.bbox_pred.weight[:, :, 0, 0], head.bbox_pred.bias
            deltas = weight @ features[-1].relu() + bias
            expected = (features[0], features[-1], logits, deltas)
            for actual, value in zip(output, expected):
                torch.testing.assert_close(actual[row], value, atol=1e-5, rtol=1e-5)
            row += 1
    assert row == len(output.logits) == 12


@pytest.mark.parametrize("split", [True, False])
def test_gather_first_equals_dense_with_gradients(split):
    results = []
    for gather_first in (True, False):
        head = s_head(split=split, gather_first=gather_first)
        features, deltas = _inputs(requires_grad=True)
        boxes = proposals([30, 25])
        output = head.predict(head(features, deltas), boxes)
        torch.manual_seed(0)
        sum(head.losses(output, boxes).values()).backward()
        detections = head.eval().inference(output.detach(), boxes)
        results.append(
            [
                *output,
                *(x.grad for x in (*features, *head.parameters())),
                *(d.pred_boxes.tensor for d in detections),
            ]
        )
    for sparse, dense in zip(*results):
        torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-4)


def test_aligned_maps_come_from_the_layer_of_the_level():
    head = s_head()
    features, deltas = _inputs()
    aligned, offsets = head(features, deltas), head.offsets(features, deltas)
    assert set(head.align) == {"3", "5"}
    for level, size in enumerate((3, 5, 5)):
        layer = head.align[str(size)]
        torch.testing.assert_close(aligned[level], layer(features[level], deltas[level]).relu())
        torch.testing.assert_close(offsets[level], layer.micro_network(deltas[level]))


def test_gradient_does_not_reach_the_deltas_unless_wanted():
    for detach in (True, False):
        head = s_head(detach_deltas=detach)
        features, deltas = _inputs(requires_grad=True)
        boxes = proposals([9, 9])
        output = head.predict(head(features, deltas), boxes)
        sum(head.losses(output, boxes).values()).backward()
        reached = [x.grad is not None and bool(x.grad.any()) for x in deltas]
        assert not any(reached) if detach else any(reached)
        assert all(x.grad is not None for x in (*features, *head.parameters()))
        offsets = head.offsets(features, deltas)
        assert all(x.requires_grad for x in offsets)


def test_hardest_boxes():
    values = torch.tensor([0.1, 2, 0.3, 5, 0.2])
    rows = hardest_rows(values, [5], 2)
    assert set(rows.tolist()) == {1, 3} and values[rows].mean() == 3.5
    # of each image, all where there are fewer, none where there is none
    assert sorted(hardest_rows(values, [3, 0, 1, 1], 2).tolist()) == [1, 2, 3, 4]
    assert hardest_rows(values[:0], [0, 0], 2).tolist() == []


def test_classification_loss_with_given_cross_entropies():
    (boxes,) = proposals([5])
    boxes.gt_classes = torch.tensor([0, 1, 2, 3, 3])
    # class y with probability exp(-ce), the rest to another one
    logits = torch.full((5, NUM_CLASSES + 1), -100.0)
    for row, (y, ce) in enumerate(zip(boxes.gt_classes, (0.1, 2, 0.3, 5, 0.2))):
        logits[row, y], logits[row, (y + 1) % 4] = -ce, math.log(1 - math.exp(-ce))
    output = _output([boxes], logits)
    loss = s_head(cls_topk=2).losses(output, [boxes])["loss_s_cls"]
    assert loss.item() == pytest.approx(3.5, abs=1e-5)
    loss.backward()
    assert (output.logits.grad.abs().sum(1) > 0).tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("topk, weight", [(4, 1.0), (100, 0.5)])
def test_losses_against_a_loop(topk, weight):
    counts = [12, 9, 0]
    boxes = proposals(counts, seed=3)
    output = _output(boxes)
    head = s_head(cls_topk=topk, max_pos_reg=64, box_reg_loss_weight=weight)
    losses = head.losses(output, boxes)
    hardest, distance, row = [], 0.0, 0
    for instances in boxes:
        values = []
        for i in range(len(instances)):
            y = instances.gt_classes[i]
            values.append(-output.logits[row].log_softmax(0)[y].item())
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
        hardest += sorted(values)[-topk:]
    expected_cls = sum(hardest) / len(hardest)
    assert len(hardest) == (8 if topk == 4 else 21) and distance > 0
    assert losses["loss_s_cls"].item() == pytest.approx(expected_cls, rel=1e-5)
    assert losses["loss_s_reg"].item() == pytest.approx(weight * distance / len(hardest), rel=1e-5)


def test_positives_of_the_regression_are_a_random_part_of_each_image():
    boxes = proposals([20, 3, 8], positives=0.8)
    positives = torch.cat([x.gt_classes < NUM_CLASSES for x in boxes])
    expected = [min(4, int(x.sum())) for x in positives.split([20, 3, 8])]
    assert expected[0] == 4
    seen = torch.zeros(31, dtype=torch.bool)
    head, output = s_head(max_pos_reg=4), _output(boxes)
    for seed in range(60):
        torch.manual_seed(seed)
        loss = head.losses(output, boxes)["loss_s_reg"]
        picked = torch.autograd.grad(loss, output.deltas)[0].abs().sum(1) > 0
        assert [int(x.sum()) for x in picked.split([20, 3, 8])] == expected
        seen |= picked
    assert seen.equal(positives)


@pytest.mark.parametrize("gather_first", [True, False])
@pytest.mark.parametrize("counts, positives", [([0, 0], 0.0), ([4, 0], 0.0), ([4, 3], 0.0)])
def test_no_boxes_or_no_positives(counts, positives, gather_first):
    head = s_head(gather_first=gather_first)
    features, deltas = _inputs(requires_grad=True)
    boxes = proposals(counts, positives=positives)
    output = head.predict(head(features, deltas), boxes)
    losses = head.losses(output, boxes)
    assert losses["loss_s_reg"].item() == 0
    assert math.isfinite(losses["loss_s_cls"].item())
    assert (losses["loss_s_cls"].item() == 0) == (sum(counts) == 0)
    sum(losses.values()).backward()
    for x in (*features, *head.parameters()):
        assert x.grad is not None and x.grad.isfinite().all()
    detections = head.inference(output, boxes)
    assert [len(x) > 0 for x in detections] == [count > 0 for count in counts]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gather_first", [True, False])
def test_half_precision(dtype, gather_first):
    head = s_head(gather_first=gather_first)
    features, deltas = _inputs()
    boxes = proposals([30, 25])
    with torch.autocast("cpu", dtype=dtype):
        half = [x.to(dtype).requires_grad_() for x in features]
        output = head.predict(head(half, [x.to(dtype) for x in deltas]), boxes)
        losses = head.losses(output, boxes)
    sum(losses.values()).backward()
    assert all(x.dtype is torch.float32 for x in (*output, *losses.values()))
    assert all(x.grad.isfinite().all() for x in (*half, *head.parameters()))
    expected = head.predict(head(features, deltas), boxes)
    torch.testing.assert_close(output.logits, expected.logits, atol=0.1, rtol=0.1)


def _one_image(boxes, size=(64, 96)):
    result = Instances(size)
    result.proposal_boxes = Boxes(torch.tensor(boxes))
    return [result]


def test_second_regression_starts_at_the_adjusted_box():
    target = torch.tensor([[40.0, 20, 88, 60]])
    deltas = torch.tensor([[10 / 12, 0, 0, 5 * math.log(1.25)]])
    assert deltas[0, 3].item() == pytest.approx(1.1157, abs=1e-4)
    boxes = _one_image([[36.0, 24, 84, 56]])
    transform = Box2BoxTransform(WEIGHTS)
    torch.testing.assert_close(transform.get_deltas(boxes[0].proposal_boxes.tensor, target), deltas)
    logits = torch.tensor([[0.0, 9, 0, 0]])
    (found,) = s_head().inference(_output(boxes, logits, deltas).detach(), boxes)
    torch.testing.assert_close(found.pred_boxes.tensor[:1], target)
    assert found.pred_classes[0] == 1
    assert found.scores[0].item() == pytest.approx(math.exp(9) / (math.exp(9) + 3), rel=1e-6)


def test_thresholds_of_detections():
    corners = [[0.0, 0, 20, 20], [30, 30, 50, 50], [60, 30, 90, 60]]
    probabilities = torch.tensor(
        [[0.0051, 1e-9, 1e-9, 0.9949], [0.004, 1e-9, 1e-9, 0.996], [0.5, 0.3, 1e-9, 0.2]]
    )
    boxes = _one_image(corners)
    output = _output(boxes, probabilities.log(), torch.zeros(3, 4)).detach()
    (found,) = s_head().inference(output, boxes)
    # one of the first box, none of the second, two classes of the third
    torch.testing.assert_close(found.scores, torch.tensor([0.5, 0.3, 0.0051]))
    assert found.pred_classes.tolist() == [0, 1, 0]
    torch.testing.assert_close(
        found.pred_boxes.tensor, torch.tensor([corners[2], corners[2], corners[0]])
    )
    (found,) = s_head(test_topk_per_image=1).inference(output, boxes)
    assert len(found) == 1


@pytest.mark.parametrize("shift, kept", [(4.0, 1), (6.0, 2)])
def test_duplicates_are_suppressed_within_a_class_above_iou_06(shift, kept):
    # IoU of two 20 x 20 boxes: 16/24 = 0.667 and 14/26 = 0.538
    boxes = _one_image([[0.0, 0, 20, 20], [shift, 0, 20 + shift, 20]])
    logits = torch.tensor([[9.0, 0, 0, 0], [8.0, 0, 0, 0]])
    output = _output(boxes, logits, torch.zeros(2, 4)).detach()
    (found,) = s_head().inference(output, boxes)
    assert len(found) == kept


def test_clipped_to_the_image():
    boxes = _one_image([[60.0, 40, 90, 60]], size=(50, 70))
    output = _output(boxes, torch.tensor([[9.0, 0, 0, 0]]), torch.zeros(1, 4)).detach()
    (found,) = s_head().inference(output, boxes)
    assert found.pred_boxes.tensor[0].tolist() == [60, 40, 70, 50]


def _paper_head(**overrides):
    cfg = get_cfg()
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    for key, value in overrides.items():
        cfg.merge_from_list([f"MODEL.MIMICDET.{key}", value])
    with torch.device("meta"):
        return MimicSHead(cfg, [ShapeSpec(channels=256)] * 5)


@pytest.mark.parametrize(
    "overrides, millions",
    [
        ({}, 2.868),
        ({"S_HEAD.KERNELS": [5] * 5}, 2.267),
        # a single projection instead of two
        ({"T_HEAD.VARIANT": "light"}, 2.605),
    ],
)
def test_number_of_parameters_with_256_channels(overrides, millions):
    head = _paper_head(**overrides)
    assert sum(x.numel() for x in head.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)


def test_parts_of_the_parameters():
    head = _paper_head()

    def millions(module):
        return sum(x.numel() for x in module.parameters()) / 1e6

    parts = [millions(x) for x in (head.align["5"], head.align["3"], head.projections)]
    parts.append(millions(head.cls_score) + millions(head.bbox_pred))
    assert parts == pytest.approx([1.654, 0.601, 0.526, 0.087], abs=6e-4)


def test_initialisation_and_config():
    cfg = get_cfg()
    cfg.MODEL.MIMICDET.S_HEAD.FEAT_DIM = 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    torch.manual_seed(0)
    head = MimicSHead(cfg, [ShapeSpec(channels=32)] * 5)
    assert head.kernels == [3, 5, 5, 5, 5] and len(head.projections) == 2
    assert head.cls_score.out_channels == 8 and head.bbox_pred.out_channels == 4
    for layer in (*head.projections, head.cls_score, head.bbox_pred):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.15)
        assert not layer.bias.any()


def test_scale_of_the_logits_by_initialisation():
    """The config's comment: N(0, 0.01) shrinks it about 50 and 400 times, "he" hardly."""

    def shrinkage(channels, feature_dim, init):
        cfg = get_cfg()
        cfg.MODEL.MIMICDET.S_HEAD.FEAT_DIM = feature_dim
        cfg.MODEL.MIMICDET.S_HEAD.INIT = init
        cfg.MODEL.MIMICDET.S_HEAD.KERNELS = [5]
        torch.manual_seed(0)
        head = MimicSHead(cfg, [ShapeSpec(channels=channels)])
        maps = torch.randn(1, channels, 12, 12)
        boxes = Instances((96, 96), anchor_index=torch.arange(144))
        output = head.predict(head([maps], [torch.zeros(1, 4, 12, 12)]), [boxes])
        return output.logits.std().item(), output.cls_feature.std().item()

    paper, paper_features = shrinkage(256, 1024, "gaussian")
    quarter, quarter_features = shrinkage(64, 256, "gaussian")
    assert 1 / paper == pytest.approx(50, rel=0.3) and 1 / quarter == pytest.approx(400, rel=0.3)
    for width in (256, 64):
        # variance 2 before the last ReLU, as behind any layer of this kind
        assert shrinkage(width, 4 * width, "he")[1] == pytest.approx(2**0.5, rel=0.15)
        # a ReLU between two layers halves the second moment
        assert shrinkage(width, 4 * width, "xavier")[1] == pytest.approx(0.5**0.5, rel=0.15)
    assert paper_features < 0.1 and quarter_features < 0.03


def test_initial_probability_of_an_object():
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    cfg.MODEL.MIMICDET.S_HEAD.FEAT_DIM = 32
    cfg.MODEL.MIMICDET.S_HEAD.PRIOR_PROB = 0.25
    head = MimicSHead(cfg, [ShapeSpec(channels=16)] * 5)
    probabilities = head.cls_score.bias.softmax(dim=0)
    expected = torch.tensor([0.25 / 7] * 7 + [0.75])
    torch.testing.assert_close(probabilities, expected)
    boxes = Instances((96, 96), anchor_index=torch.arange(144))
    output = head.predict([torch.randn(1, 16, 12, 12)], [boxes])
    assert (output.logits.softmax(dim=1)[:, -1] - 0.75).abs().max() < 0.05
    for value in (-0.1, 1.0):
        cfg.MODEL.MIMICDET.S_HEAD.PRIOR_PROB = value
        with pytest.raises(ValueError, match=r"S_HEAD.PRIOR_PROB must be in \[0, 1\), got"):
            MimicSHead(cfg, [ShapeSpec(channels=16)] * 5)


def test_unknown_initialisation():
    cfg = get_cfg()
    cfg.MODEL.MIMICDET.S_HEAD.INIT = "uniform"
    with pytest.raises(ValueError, match="S_HEAD.INIT.*gaussian.*he.*xavier.*'uniform'"):
        MimicSHead(cfg, [ShapeSpec(channels=16)] * 5)


def test_thresholds_come_from_the_config():
    """Two boxes of one class, IoU (24 - 6) / (24 + 6) = 0.6; scores 0.42 and 0.21."""
    boxes = Instances((64, 64))
    boxes.proposal_boxes = Boxes(torch.tensor([[0.0, 0, 24, 24], [6.0, 0, 30, 24]]))
    scores = torch.tensor([[0.42, 0.08, 0.5], [0.21, 0.09, 0.7]])
    output = _output([boxes], scores.log(), torch.zeros(2, 4))

    def detected(**changes):
        cfg = get_cfg()
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
        values = {"SCORE_THRESH_TEST": 0.1, "NMS_THRESH_TEST": 0.5, **changes}
        for key, value in values.items():
            node = cfg.TEST if key in cfg.TEST else cfg.MODEL.ROI_HEADS
            node[key] = value
        head = MimicSHead(cfg, [ShapeSpec(channels=8)] * 5)
        return head.inference(output, [boxes])[0].scores.tolist()

    assert detected() == pytest.approx([0.42])
    assert detected(NMS_THRESH_TEST=0.65) == pytest.approx([0.42, 0.21])
    assert detected(NMS_THRESH_TEST=0.65, SCORE_THRESH_TEST=0.3) == pytest.approx([0.42])
    assert detected(NMS_THRESH_TEST=0.65, DETECTIONS_PER_IMAGE=1) == pytest.approx([0.42])


def test_bad_values_name_the_key():
    with pytest.raises(ValueError, match=r"KERNELS \[3, 5, 5, 5, 5\].* 4 levels.*RPN.IN_FEATURES"):
        MimicSHead(get_cfg(), [ShapeSpec(channels=8)] * 4)
    with pytest.raises(ValueError, match="S_HEAD.CLS_TOPK .* 0"):
        s_head(cls_topk=0)
    with pytest.raises(ValueError, match="S_HEAD.MAX_POS_REG .* -1"):
        s_head(max_pos_reg=-1)


def test_checkpoint_does_not_depend_on_gather_first():
    s_head(gather_first=False).load_state_dict(s_head(gather_first=True).state_dict())


def test_steps_of_training_lower_the_losses():
    head = s_head()
    features, deltas = _inputs()
    boxes = proposals([30, 25], seed=4)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.02)

    def total():
        return sum(head.losses(head.predict(head(features, deltas), boxes), boxes).values())

    before = total()
    for _ in range(5):
        optimizer.zero_grad()
        total().backward()
        optimizer.step()
    assert total() < before
