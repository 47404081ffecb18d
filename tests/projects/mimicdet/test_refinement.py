"""The refinement module: losses, normalisers, adjusted boxes, gradients, errors."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.structures import Boxes, pairwise_iou
from torch.nn import functional as F

from kd_d2.projects.mimicdet import RefinementModule
from kd_d2.projects.mimicdet.cells import cell_levels, gather_cells

from .refinement_cases import (
    CHANNELS,
    GROUND_TRUTH,
    NAMES,
    POSITIVES,
    SIDES,
    STRIDES,
    grids,
    image_list,
    pyramid,
    refinement,
    run,
    scalars,
    truth,
)
from .whole import mimicdet_cfg

SMALL = (256, 320)
KEYS = {"loss_refine_cls", "loss_refine_reg"}
TWO_BOXES = [[60, 60, 100, 100], [130, 60, 260, 200]]


def losses_by_hand(module, features, gt):
    """BCE of all anchors and L1 of the positives, summed, for one image with ``gt``."""
    logits, deltas = module.rpn_head([features[name] for name in NAMES])
    logits = torch.cat([x.flatten() for x in logits])
    deltas = torch.cat([x[0].flatten(1).T for x in deltas])
    anchors = Boxes.cat(module.anchor_generator([features[name] for name in NAMES])).tensor
    target = torch.zeros_like(logits)
    l1 = 0.0
    for number, cells in enumerate(POSITIVES):
        x1, y1, x2, y2 = gt[number]
        for cell in cells:
            target[cell] = 1
            ax1, ay1, ax2, ay2 = anchors[cell].tolist()
            side = ax2 - ax1
            goal = [
                ((x1 + x2) - (ax1 + ax2)) / 2 / side,
                ((y1 + y2) - (ay1 + ay2)) / 2 / side,
                math.log((x2 - x1) / side),
                math.log((y2 - y1) / side),
            ]
            l1 = l1 + (deltas[cell] - torch.tensor(goal)).abs().sum()
    bce = -(target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)).sum()
    return bce, l1


@pytest.mark.parametrize(
    "cls_norm, cls_divisor", [("fixed", 256.0), ("num_pos", 16.0), ("mean", 5456.0)]
)
@pytest.mark.parametrize("reg_norm, reg_divisor", [("num_pos", 16.0), ("fixed", 256.0)])
def test_losses_and_normalisers(cls_norm, cls_divisor, reg_norm, reg_divisor):
    node = "MODEL.MIMICDET.REFINE."
    options = {node + "CLS_NORM": cls_norm, node + "REG_NORM": reg_norm}
    module, features = refinement(lively=True, **options), pyramid()
    bce, l1 = losses_by_hand(module, features, GROUND_TRUTH)
    with scalars() as logged:
        losses = module(image_list([(512, 512)]), features, [truth(GROUND_TRUTH)]).losses
    assert set(losses) == KEYS
    torch.testing.assert_close(losses["loss_refine_cls"], bce / cls_divisor)
    torch.testing.assert_close(losses["loss_refine_reg"], l1 / reg_divisor)
    assert logged["mimicdet/num_refine_positives"] == 16


def test_losses_of_a_batch():
    module, features = refinement(lively=True), pyramid(num_images=2)
    both = run(module, features, [GROUND_TRUTH, []]).losses
    single = [
        run(module, {name: x[i : i + 1] for name, x in features.items()}, [boxes]).losses
        for i, boxes in enumerate([GROUND_TRUTH, []])
    ]
    # per image 256; of positives there are 16 in all
    mean = (single[0]["loss_refine_cls"] + single[1]["loss_refine_cls"]) / 2
    torch.testing.assert_close(both["loss_refine_cls"], mean)
    torch.testing.assert_close(both["loss_refine_reg"], single[0]["loss_refine_reg"])


def test_loss_weights():
    weights = {"MODEL.RPN.LOSS_WEIGHT": 2.0, "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": 1.5}
    plain = run(refinement(), pyramid(size=SMALL), [TWO_BOXES], size=SMALL).losses
    weighted = run(refinement(**weights), pyramid(size=SMALL), [TWO_BOXES], size=SMALL).losses
    torch.testing.assert_close(weighted["loss_refine_cls"], 2 * plain["loss_refine_cls"])
    torch.testing.assert_close(weighted["loss_refine_reg"], 3 * plain["loss_refine_reg"])


@pytest.mark.parametrize("prior, expected", [(0.01, 1.238), (0.5, 60.7)])
def test_initial_classification_loss(prior, expected):
    # 22400 anchors (an image of 800x1344), 20 positives
    module = refinement(**{"MODEL.MIMICDET.REFINE.PRIOR_PROB": prior})
    features = {name: 0.1 * x for name, x in pyramid(size=(800, 1344)).items()}
    logits, deltas = module.rpn_head([features[name] for name in NAMES])
    labels = torch.zeros(22400, dtype=torch.int8)
    labels[torch.arange(20) * 1000] = 1
    anchors = module.anchor_generator([features[name] for name in NAMES])
    assert sum(map(len, anchors)) == 22400
    with scalars():
        losses = module.losses(
            anchors,
            [x.flatten(1) for x in logits],
            [labels],
            [x.flatten(2).transpose(1, 2) for x in deltas],
            [Boxes.cat(anchors).tensor],
        )
    assert losses["loss_refine_cls"].item() == pytest.approx(expected, rel=0.02)


def test_images_without_ground_truth():
    module, features = refinement(lively=True), pyramid(2, SMALL, requires_grad=True)
    output = run(module, features, [[], []], size=SMALL)
    assert output.losses["loss_refine_reg"] == 0 and output.losses["loss_refine_cls"] > 0
    sum(output.losses.values()).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert module.rpn_head.anchor_deltas.weight.grad.eq(0).all()
    assert all(x.grad is not None for x in features.values())


@pytest.mark.parametrize("scope, thresh", [("joint", 0.8), ("joint", 0.3), ("per_level", 0.3)])
def test_adjusted_boxes_in_training(scope, thresh):
    module = refinement(
        lively=True,
        **{
            "MODEL.MIMICDET.PROPOSAL.NMS_SCOPE": scope,
            "MODEL.RPN.NMS_THRESH": thresh,
            "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000,
        },
    )
    # the second image is padded
    features, sizes = pyramid(2, SMALL), [SMALL, (200, 230)]
    output = run(module, features, [[], TWO_BOXES], sizes, SMALL)
    anchors, transform = Boxes.cat(output.anchors), module.box2box_transform
    logits = module.rpn_head([features[name] for name in NAMES])[0]
    index = [x.anchor_index for x in output.proposals]
    deltas = gather_cells(output.deltas, index).split([len(x) for x in index])
    scores = gather_cells(logits, index).flatten().split([len(x) for x in index])
    for boxes, own_deltas, own_scores, size in zip(output.proposals, deltas, scores, sizes):
        assert boxes.image_size == size and 20 < len(boxes) <= 2000
        decoded = Boxes(transform.apply_deltas(own_deltas, anchors[boxes.anchor_index].tensor))
        decoded.clip(size)
        assert torch.equal(decoded.tensor, boxes.proposal_boxes.tensor)
        assert boxes.proposal_boxes.nonempty().all()
        assert torch.equal(own_scores, boxes.objectness_logits)
        assert torch.equal(own_scores, own_scores.sort(descending=True).values)
        assert torch.equal(boxes.level, cell_levels(boxes.anchor_index, grids(SMALL)))
        assert boxes.anchor_index.dtype == boxes.level.dtype == torch.int64
        assert len(boxes.anchor_index.unique()) == len(boxes)
        iou = pairwise_iou(boxes.proposal_boxes, boxes.proposal_boxes).fill_diagonal_(0)
        same_level = boxes.level[:, None] == boxes.level[None]
        assert iou[same_level].max() <= thresh
        assert (iou.max() <= thresh) == (scope == "joint")
        assert not boxes.proposal_boxes.tensor.requires_grad
        assert not boxes.objectness_logits.requires_grad


def test_boxes_do_not_depend_on_the_ground_truth_and_are_limited():
    module, features = refinement(lively=True), pyramid(1, SMALL)
    boxes = [run(module, features, [gt], size=SMALL).proposals[0] for gt in ([], TWO_BOXES)]
    assert torch.equal(boxes[0].anchor_index, boxes[1].anchor_index)
    assert torch.equal(boxes[0].proposal_boxes.tensor, boxes[1].proposal_boxes.tensor)
    assert len(boxes[0]) == 100  # POST_NMS_TOPK_TRAIN of the toy
    module.pre_nms_topk[True] = 30
    fewer = run(module, features, [[]], size=SMALL).proposals[0]
    assert 0 < len(fewer) <= 30
    logits = torch.cat([x.flatten() for x in module.rpn_head(list(features.values()))[0]])
    assert set(fewer.anchor_index.tolist()) <= set(logits.topk(30).indices.tolist())


@pytest.mark.parametrize("limits, count", [((0, 60), 60), ((40, 60), 40), ((0, 5000), None)])
def test_evaluation_takes_the_best_without_suppression(limits, count):
    names = ("MODEL.RPN.PRE_NMS_TOPK_TEST", "MODEL.RPN.POST_NMS_TOPK_TEST")
    module = refinement(lively=True, **dict(zip(names, limits))).eval()
    features = pyramid(1, SMALL)
    output = module(image_list([SMALL], SMALL), features)
    assert output.losses == {}
    logits = torch.cat([x.flatten() for x in module.rpn_head(list(features.values()))[0]])
    count = count or len(logits)
    order = logits.argsort(descending=True)[:count]
    (boxes,) = output.proposals
    # without padding no box is empty
    assert torch.equal(boxes.anchor_index, order)
    iou = pairwise_iou(boxes.proposal_boxes, boxes.proposal_boxes).fill_diagonal_(0)
    assert count != len(logits) or iou.max() > 0.8


def test_empty_boxes_are_dropped():
    module = refinement().eval()
    torch.nn.init.zeros_(module.rpn_head.anchor_deltas.weight)
    module.post_nms_topk[False] = 10**6
    output = module(image_list([(100, 60)], SMALL), pyramid(1, SMALL))
    (boxes,) = output.proposals
    corners = Boxes.cat(output.anchors).tensor
    inside = (corners[:, 0] < 60) & (corners[:, 1] < 100)
    assert set(boxes.anchor_index.tolist()) == set(inside.nonzero().flatten().tolist())


def test_only_its_own_losses_reach_the_head():
    module, features = refinement(lively=True), pyramid(1, SMALL, requires_grad=True)
    output = run(module, features, [TWO_BOXES], size=SMALL)
    (boxes,) = output.proposals
    for field in (boxes.proposal_boxes.tensor, boxes.objectness_logits):
        assert field.grad_fn is None
    assert all(x.grad_fn is not None for x in output.deltas)
    head = dict(module.rpn_head.named_parameters())
    reached = {
        name: {
            key
            for key, gradient in zip(
                head,
                torch.autograd.grad(loss, head.values(), retain_graph=True, allow_unused=True),
            )
            if gradient is not None and gradient.abs().max() > 0
        }
        for name, loss in output.losses.items()
    }
    shared = {"conv.weight", "conv.bias"}
    predictors = {"cls": "objectness_logits", "reg": "anchor_deltas"}
    for kind, layer in predictors.items():
        expected = shared | {f"{layer}.weight", f"{layer}.bias"}
        assert reached[f"loss_refine_{kind}"] == expected


def test_losses_are_fp32_under_autocast():
    module, features = refinement(), pyramid(1, SMALL)
    expected = run(module, features, [TWO_BOXES], size=SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(module, features, [TWO_BOXES], size=SMALL)
    for name, loss in output.losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected.losses[name], rtol=2e-2, atol=0)
    assert output.proposals[0].proposal_boxes.tensor.dtype == torch.float32


def test_divergence_raises_in_training_only():
    module, features = refinement(), pyramid(1, SMALL)
    features["p4"][0, 0, 3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="diverged"):
        run(module, features, [TWO_BOXES], size=SMALL)
    (boxes,) = module.eval()(image_list([SMALL], SMALL), features).proposals
    assert len(boxes) and boxes.proposal_boxes.tensor.isfinite().all()


def test_training_needs_ground_truth():
    with pytest.raises(ValueError, match="gt_instances"):
        refinement()(image_list([SMALL], SMALL), pyramid(1, SMALL))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.MIMICDET.REFINE.CLS_NORM", "sum", "CLS_NORM must be one of"),
        ("MODEL.MIMICDET.REFINE.REG_NORM", "mean", "REG_NORM must be one of"),
        ("MODEL.MIMICDET.PROPOSAL.NMS_SCOPE", "all", "NMS_SCOPE must be one of"),
        ("MODEL.MIMICDET.REFINE.PRIOR_PROB", 1.0, "PRIOR_PROB must lie between 0 and 1, got 1.0"),
        ("MODEL.MIMICDET.REFINE.BASE_SCALE", 8.0, "BASE_SCALE 8.0 .*ANCHOR_GENERATOR"),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.0, "OFFSET must be 0.5.*got 0.0"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[x, x] for x in SIDES], "one anchor per cell"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5]], "square anchors"),
        ("MODEL.RPN.IN_FEATURES", ["p3", "p9"], "RPN.IN_FEATURES is .*p9.* returns"),
    ],
)
def test_bad_configs(key, value, message):
    shapes = {n: ShapeSpec(channels=CHANNELS, stride=s) for n, s in zip(NAMES, STRIDES)}
    with pytest.raises(ValueError, match=message):
        build_proposal_generator(mimicdet_cfg(**{key: value}), shapes)


def test_it_is_what_the_config_names():
    module = refinement()
    assert isinstance(module, RefinementModule)
    assert set(dict(module.named_parameters())) == {
        f"rpn_head.{layer}.{kind}"
        for layer in ("conv", "objectness_logits", "anchor_deltas")
        for kind in ("weight", "bias")
    }
    bias = -math.log(99)
    assert module.rpn_head.objectness_logits.bias.item() == pytest.approx(bias)
