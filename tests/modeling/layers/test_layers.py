"""Scale, the distribution coder, centerness, score factors, validity of anchors."""

import math

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from kd_d2.modeling.layers import (
    DistributionBox2BoxTransform,
    Scale,
    apply_score_factor,
    centerness,
    paired_iou,
    valid_anchor_mask,
)


def test_scale_multiplies_and_learns():
    scale, x = Scale(2.0), torch.randn(2, 3)
    torch.testing.assert_close(scale(x), 2 * x)
    scale(x).sum().backward()
    torch.testing.assert_close(scale.scale.grad, x.sum())
    assert list(scale.state_dict()) == ["scale"]


def test_distribution_coder_decodes_expectations_in_strides():
    coder = DistributionBox2BoxTransform(reg_max=4, anchor_scale=8.0)
    assert coder.box_dim == 20
    anchor = torch.tensor([[32.0 - 64, 48.0 - 64, 32.0 + 64, 48.0 + 64]])  # stride 16, (32, 48)
    logits = torch.full((1, 4, 5), -100.0)
    logits[0, 0, 1] = 0  # left: 1
    logits[0, 1, 0] = 0  # top: 0
    logits[0, 2, [2, 3]] = 0  # right: 2.5
    logits[0, 3] = 0  # bottom: uniform, 2
    expected = torch.tensor([[32.0 - 16, 48.0, 32.0 + 40, 48.0 + 32]])
    torch.testing.assert_close(coder.apply_deltas(logits.view(1, 20), anchor), expected)
    torch.testing.assert_close(
        coder.get_deltas(anchor, expected), torch.tensor([[1.0, 0.0, 2.5, 2.0]])
    )


def test_distribution_coder_clamps_only_on_request_and_takes_no_boxes():
    coder = DistributionBox2BoxTransform(reg_max=16, anchor_scale=8.0)
    anchor = torch.tensor([[-32.0, -32.0, 32.0, 32.0]])  # stride 8 at (0, 0)
    box = torch.tensor([[8.0, -16.0, 800.0, 24.0]])
    torch.testing.assert_close(coder.get_deltas(anchor, box), torch.tensor([[-1.0, 2, 100, 3]]))
    torch.testing.assert_close(
        coder.get_deltas(anchor, box, max_distance=15.9), torch.tensor([[0.0, 2, 15.9, 3]])
    )
    assert coder.apply_deltas(torch.zeros(0, 68), torch.zeros(0, 4)).shape == (0, 4)


def test_distribution_coder_is_fp32_and_never_inverts_boxes():
    torch.manual_seed(0)
    coder = DistributionBox2BoxTransform()
    anchors = torch.tensor([[-32.0, -32.0, 32.0, 32.0]]).repeat(50, 1) + 500
    with torch.autocast("cpu", torch.bfloat16):
        boxes = coder.apply_deltas((20 * torch.randn(50, 68)).bfloat16(), anchors)
    assert boxes.dtype == torch.float32
    assert (boxes[:, 2:] >= boxes[:, :2]).all()


@pytest.mark.parametrize("reg_max, anchor_scale", [(0, 8.0), (16, 0.0)])
def test_distribution_coder_rejects(reg_max, anchor_scale):
    with pytest.raises(ValueError, match="REG_MAX.*ANCHOR_SCALE"):
        DistributionBox2BoxTransform(reg_max, anchor_scale)


def test_centerness_worked_out_by_hand():
    values = centerness(torch.tensor([[1.0, 2, 3, 2], [4.0, 4, 4, 4], [0.0, 1, 2, 1]]))
    torch.testing.assert_close(values, torch.tensor([math.sqrt(1 / 3), 1.0, 0.0]))
    assert values[0].item() == pytest.approx(0.577350, abs=2e-6)
    assert centerness(torch.zeros(0, 4)).shape == (0,)


def test_paired_iou_worked_out_by_hand():
    box = torch.tensor([[0.0, 0, 2, 2], [0.0, 0, 1, 1], [0.0, 0, 4, 2], [0.0, 0, 3, 3]])
    other = torch.tensor([[1.0, 1, 3, 3], [2.0, 0, 3, 1], [0.0, 0, 4, 4], [0.0, 0, 3, 3]])
    torch.testing.assert_close(paired_iou(box, other), torch.tensor([1 / 7, 0.0, 0.5, 1.0]))


def test_score_factor_keeps_candidates_chosen_by_score_alone():
    scores = torch.tensor([[0.9, 0.04], [0.5, 0.3], [0.06, 0.2]])
    factors = torch.tensor([[0.01], [0.5], [1.0]])
    before = scores.clone()
    everything = apply_score_factor(scores, factors, threshold=0.05, topk=10)
    torch.testing.assert_close(everything, torch.tensor([[0.009, 0.0], [0.25, 0.15], [0.06, 0.2]]))
    # 0.9 stays among the best two although its product is the smallest.
    best_two = apply_score_factor(scores, factors, threshold=0.05, topk=2)
    torch.testing.assert_close(best_two, torch.tensor([[0.009, 0.0], [0.25, 0.0], [0.0, 0.0]]))
    assert torch.equal(scores, before)
    assert apply_score_factor(torch.zeros(0, 2), torch.zeros(0, 1), 0.05, 10).shape == (0, 2)


@pytest.mark.parametrize("scales, ratios, offset", [((8,), (1.0,), 0.0), ((4, 8), (0.5, 2), 0.5)])
def test_valid_anchors_are_the_cells_of_the_image_alone(scales, ratios, offset):
    strides = (8, 16, 32, 64, 128)
    generator = DefaultAnchorGenerator(
        sizes=[[n * s for n in scales] for s in strides],
        aspect_ratios=[list(ratios)],
        strides=strides,
        offset=offset,
    )
    batch_height, batch_width = 160, 256
    features = [
        torch.zeros(1, 1, math.ceil(batch_height / s), math.ceil(batch_width / s)) for s in strides
    ]
    anchors = generator(features)
    per_cell = len(scales) * len(ratios)
    for image_size, padded in [
        ((97, 130), (128, 160)),
        ((160, 256), (160, 256)),
        ((1, 1), (32, 32)),
    ]:
        mask = valid_anchor_mask(anchors, strides, image_size, 32, offset)
        expected = []
        for feature, stride in zip(features, strides):
            cells = torch.zeros(feature.shape[-2:], dtype=torch.bool)
            cells[: math.ceil(padded[0] / stride), : math.ceil(padded[1] / stride)] = True
            expected.append(cells.flatten().repeat_interleave(per_cell))
        assert torch.equal(mask, torch.cat(expected))
    # Without divisibility the image's own size counts.
    assert valid_anchor_mask(anchors, strides, (8, 8), 0, offset).sum() == 5 * per_cell
