"""ATSS assignment against a plain loop over boxes and anchors."""

import math
import statistics

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes

from kd_d2.modeling.layers import ATSSAssigner, atss_threshold

STRIDES = (8, 16, 32, 64)


def _anchors(height, width, strides=STRIDES):
    generator = DefaultAnchorGenerator(
        sizes=[[8.0 * s] for s in strides], aspect_ratios=[1.0], strides=strides, offset=0.0
    )
    return generator(
        [torch.zeros(1, 1, math.ceil(height / s), math.ceil(width / s)) for s in strides]
    )


def _random_boxes(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * size * 0.8
    extent = 4 + torch.rand(count, 2, generator=generator) * size * 0.6
    return Boxes(torch.cat((corner, corner + extent), dim=1))


def _iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def _assign_in_loops(anchors, gt_boxes, topk, valid):
    """Algorithm 1 of ATSS, one number at a time."""
    flat = [box.tolist() for level in anchors for box in level.tensor.double()]
    centers = [((a[0] + a[2]) / 2, (a[1] + a[3]) / 2) for a in flat]
    owner, owner_iou = [-1] * len(flat), [-1.0] * len(flat)
    for index, gt in enumerate(gt_boxes.tensor.double().tolist()):
        gx, gy = (gt[0] + gt[2]) / 2, (gt[1] + gt[3]) / 2
        candidates, start = [], 0
        for level in anchors:
            members = [r for r in range(start, start + len(level)) if valid[r]]
            members.sort(key=lambda r: ((centers[r][0] - gx) ** 2 + (centers[r][1] - gy) ** 2, r))
            candidates += members[:topk]
            start += len(level)
        ious = [_iou(flat[r], gt) for r in candidates]
        spread = statistics.stdev(ious) if len(ious) > 1 else 0.0
        threshold = statistics.fmean(ious) + spread
        for r, iou in zip(candidates, ious):
            x, y = centers[r]
            margin = min(x - gt[0], y - gt[1], gt[2] - x, gt[3] - y)
            if iou >= threshold and margin > 0.01 and iou > owner_iou[r]:
                owner[r], owner_iou[r] = index, iou
    return owner


def test_threshold_worked_out_by_hand():
    ious = torch.tensor([[0.1, 0.2, 0.6], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    torch.testing.assert_close(
        atss_threshold(ious, mask), torch.tensor([0.564575, 0.5, 0.0]), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("topk", [1, 9])
def test_equals_a_plain_loop(seed, topk):
    anchors = _anchors(128, 96)
    gt_boxes = _random_boxes(1 + 3 * seed, 110, seed)
    num_anchors = sum(len(level) for level in anchors)
    valid = torch.rand(num_anchors, generator=torch.Generator().manual_seed(seed)) < 0.8
    for mask in (torch.ones(num_anchors, dtype=torch.bool), valid):
        assigned = ATSSAssigner(topk)(anchors, gt_boxes, mask).tolist()
        assert assigned == _assign_in_loops(anchors, gt_boxes, topk, mask.tolist())


def test_assigns_most_boxes():
    anchors, gt_boxes = _anchors(128, 128), _random_boxes(10, 110, seed=3)
    assigned = ATSSAssigner(9)(anchors, gt_boxes)
    assert len(set(assigned.tolist()) - {-1}) >= 8


def test_no_ground_truth():
    anchors = _anchors(64, 64)
    assigned = ATSSAssigner(9)(anchors, Boxes(torch.zeros(0, 4)))
    assert assigned.dtype == torch.long and (assigned == -1).all()
    assert len(assigned) == sum(len(level) for level in anchors)


def test_ground_truth_outside_of_all_anchors_and_of_zero_area():
    boxes = Boxes(torch.tensor([[900.0, 900.0, 950.0, 950.0], [20.0, 20.0, 20.0, 20.0]]))
    assert (ATSSAssigner(9)(_anchors(64, 64), boxes) == -1).all()


def test_levels_smaller_than_k_and_a_single_anchor():
    anchors = _anchors(32, 32, strides=(16, 32))  # 4 anchors and 1
    box = Boxes(torch.tensor([[-60.0, -60.0, 70.0, 70.0]]))
    valid = torch.ones(5, dtype=torch.bool)
    assigned = ATSSAssigner(9)(anchors, box, valid).tolist()
    assert assigned == _assign_in_loops(anchors, box, 9, valid.tolist())
    only_one = torch.tensor([False, False, False, False, True])
    assert ATSSAssigner(9)(anchors, box, only_one).tolist() == [-1, -1, -1, -1, 0]
    assert (ATSSAssigner(9)(anchors, box, torch.zeros(5, dtype=torch.bool)) == -1).all()


def test_centre_on_the_border_is_not_inside():
    # The only valid anchor, centred on (0, 0), has the highest possible IoU of its candidates.
    anchors, valid = _anchors(8, 8, strides=(8,)), torch.ones(1, dtype=torch.bool)
    for margin, expected in ((0.009, -1), (0.011, 0)):
        box = Boxes(torch.tensor([[-margin, -margin, 30.0, 30.0]]))
        assert ATSSAssigner(9)(anchors, box, valid).tolist() == [expected]


def test_contested_anchor_goes_to_the_highest_iou_then_to_the_first():
    anchors = _anchors(8, 8, strides=(8,))  # one anchor, [-32, -32, 32, 32]
    loose, tight = [-20.0, -20.0, 20.0, 20.0], [-30.0, -30.0, 31.0, 31.0]
    assert ATSSAssigner(9)(anchors, Boxes(torch.tensor([loose, tight]))).tolist() == [1]
    assert ATSSAssigner(9)(anchors, Boxes(torch.tensor([tight, tight]))).tolist() == [0]


def test_equal_distances_do_not_depend_on_padding():
    """The same image alone and in a wider batch: the shared anchors are assigned alike."""
    gt_boxes = Boxes(torch.tensor([[20.0, 20.0, 60.0, 60.0], [4.0, 4.0, 28.0, 28.0]]))
    alone, padded = _anchors(64, 64), _anchors(64, 128)
    valid = torch.cat([level.get_centers()[:, 0] < 64 for level in padded])
    first = ATSSAssigner(9)(alone, gt_boxes)
    second = ATSSAssigner(9)(padded, gt_boxes, valid)
    assert torch.equal(first, second[valid]) and (second[~valid] == -1).all()
    assert (first >= 0).any()


def test_user_error_names_the_value():
    with pytest.raises(ValueError, match="ATSS_TOPK.*0"):
        ATSSAssigner(0)
