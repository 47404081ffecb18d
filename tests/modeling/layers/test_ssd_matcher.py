"""SSD's matching against the specification's numbers and a loop."""

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou

from kd_d2.modeling.layers import DefaultBoxGenerator, SSDMatcher

from .test_default_boxes import SIDES, SSD300


def _naive(ious, threshold):
    num_gt, num_boxes = len(ious), len(ious[0])
    result = []
    for box in range(num_boxes):
        column = [ious[gt][box] for gt in range(num_gt)]
        best = column.index(max(column))
        result.append(best if column[best] >= threshold else -1)
    for gt in range(num_gt):
        result[ious[gt].index(max(ious[gt]))] = gt
    return result


@pytest.fixture(scope="module")
def default_boxes():
    generator = DefaultBoxGenerator(**SSD300)
    return Boxes.cat(generator([torch.zeros(1, 1, side, side) for side in SIDES[300]]))


def _matched(boxes, default_boxes):
    return SSDMatcher(0.5)(pairwise_iou(Boxes(torch.tensor(boxes).float()), default_boxes))


def test_positives_of_the_specification(default_boxes):
    matched = _matched([[50, 60, 180, 220]], default_boxes)
    assert (matched >= 0).nonzero()[:, 0].tolist() == [8141, 8201, 8207, 8261, 8608, 8609, 8611]

    # Below the threshold everywhere: its best box alone.
    small = [[100, 100, 110, 110]]
    matched = _matched(small, default_boxes)
    assert (matched >= 0).nonzero()[:, 0].tolist() == [1872]
    iou = pairwise_iou(Boxes(torch.tensor(small).float()), default_boxes[1872])
    assert iou.item() == pytest.approx(0.2268, abs=1e-4)

    assert (_matched([[10, 10, 290, 280]], default_boxes) >= 0).sum() == 8
    three = _matched([[0, 0, 30, 30], [120, 130, 160, 200], [50, 60, 180, 220]], default_boxes)
    assert [(three == gt).sum().item() for gt in range(3)] == [4, 7, 7]


def test_a_later_box_takes_over_its_best_default_box():
    ious = torch.tensor([[0.9, 0.6, 0.1], [0.8, 0.3, 0.2]])
    assert SSDMatcher(0.5)(ious).tolist() == [1, 0, -1]


def test_two_boxes_with_the_same_best_default_box():
    """The last claim stands, and the first box keeps what reaches the threshold."""
    ious = torch.tensor([[0.4, 0.1], [0.4, 0.0], [0.2, 0.1]])
    assert SSDMatcher(0.5)(ious).tolist() == [2, -1]


@pytest.mark.parametrize("seed", range(30))
def test_equals_a_loop(seed):
    """Few different values, so that there are many ties."""
    generator = torch.Generator().manual_seed(seed)
    shape = [(1, 40), (3, 17), (9, 6), (12, 40)][seed % 4]
    ious = torch.randint(0, 6, shape, generator=generator) / 5
    threshold = (0.4, 0.6, 1.0)[seed % 3]
    assert SSDMatcher(threshold)(ious).tolist() == _naive(ious.tolist(), threshold)


def test_real_scenes_equal_a_loop(default_boxes):
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        corners = torch.rand(12, 2, generator=generator) * 250
        boxes = torch.cat((corners, corners + 5 + torch.rand(12, 2, generator=generator) * 150), 1)
        ious = pairwise_iou(Boxes(boxes), default_boxes)
        matched = SSDMatcher(0.5)(ious)
        assert matched.tolist() == _naive(ious.tolist(), 0.5)
        assert matched.dtype == torch.int64


def test_no_ground_truth():
    assert SSDMatcher(0.5)(torch.zeros(0, 5)).tolist() == [-1] * 5


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match="IOU_THRESH must be in"):
        SSDMatcher(threshold)
