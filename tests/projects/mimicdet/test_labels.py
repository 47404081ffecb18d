"""Labels of adjusted boxes and the T-head's random subset."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from kd_d2.projects.mimicdet import ProposalLabeler

from .refinement_cases import scalars
from .whole import mimicdet_cfg

K = 3
LABELER = ProposalLabeler(iou_threshold=0.6, num_classes=K)


def proposals(boxes):
    result = Instances((100, 100))
    result.proposal_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.anchor_index = 7 + torch.arange(len(boxes))
    return result


def ground_truth(boxes, classes):
    result = Instances((100, 100))
    result.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return result


def label(boxes, gt, classes):
    with scalars() as logged:
        (labelled,) = LABELER([proposals(boxes)], [ground_truth(gt, classes)])
    return labelled, logged


def test_threshold_is_a_positive():
    # IoU with [0, 0, 10, 10]: 0.6, 0.59, 1, 0
    boxes = [[0, 0, 10, 6], [0, 0, 10, 5.9], [0, 0, 10, 10], [50, 50, 60, 60]]
    labelled, logged = label(boxes, [[0, 0, 10, 10]], [1])
    assert labelled.gt_classes.tolist() == [1, K, 1, K]
    assert labelled.gt_boxes.tensor[0].tolist() == [0, 0, 10, 10]
    assert logged == {"mimicdet/proposal_recall": 1.0}


def test_the_best_overlap_decides():
    gt = [[0, 0, 10, 10], [0, 0, 10, 9], [70, 70, 90, 90]]
    labelled, logged = label([[0, 0, 10, 9.4], [0, 0, 10, 9.9]], gt, [2, 0, 1])
    assert labelled.gt_classes.tolist() == [0, 2]
    assert labelled.gt_boxes.tensor.tolist() == [gt[1], gt[0]]
    # nothing forces a box on the third
    assert logged["mimicdet/proposal_recall"] == pytest.approx(2 / 3)


def test_no_ground_truth_and_no_boxes():
    labelled, logged = label([[0, 0, 10, 6], [1, 1, 5, 5]], [], [])
    assert labelled.gt_classes.tolist() == [K, K] and logged == {}
    assert labelled.gt_boxes.tensor.shape == (2, 4)
    labelled, logged = label([], [[0, 0, 10, 10]], [1])
    assert len(labelled.gt_classes) == 0 and logged["mimicdet/proposal_recall"] == 0


def test_proposals_stay_as_they_were():
    before = proposals([[0, 0, 10, 6]])
    with scalars():
        (labelled,) = LABELER([before], [ground_truth([[0, 0, 10, 10]], [1])])
    assert not before.has("gt_classes") and labelled.has("gt_classes")
    assert torch.equal(labelled.anchor_index, before.anchor_index)


def labelled_image(num_positive, num_negative):
    result = proposals([[0, 0, 10, 10]] * (num_positive + num_negative))
    result.gt_classes = torch.tensor([i % K for i in range(num_positive)] + [K] * num_negative)
    return result


@pytest.mark.parametrize(
    "available, expected",
    [
        ((10, 500), (10, 118)),
        ((50, 500), (32, 96)),
        ((0, 500), (0, 128)),
        ((3, 20), (3, 20)),
        ((0, 0), (0, 0)),
    ],
)
def test_random_subset(available, expected):
    image = labelled_image(*available)
    with scalars() as logged:
        (sampled,) = LABELER.sample([image], batch_size=128, positive_fraction=0.25)
    positive = int((sampled.gt_classes < K).sum())
    assert (positive, len(sampled) - positive) == expected
    # each box at most once, fields belong together
    rows = sampled.anchor_index - 7
    assert len(rows.unique()) == len(rows)
    assert torch.equal(image.gt_classes[rows], sampled.gt_classes)
    assert (logged["mimicdet/num_fg_samples"], logged["mimicdet/num_bg_samples"]) == expected


def test_subset_is_random():
    image = labelled_image(10, 500)
    with scalars():
        first, second = (LABELER.sample([image], 64, 0.25)[0].anchor_index for _ in range(2))
    assert set(first.tolist()) != set(second.tolist())


def test_from_config():
    labeler = ProposalLabeler(mimicdet_cfg())
    assert labeler.iou_threshold == 0.6 and labeler.num_classes == K


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("PROPOSAL_APPEND_GT", True, "PROPOSAL_APPEND_GT is True.*False"),
        ("IOU_THRESHOLDS", [0.3, 0.6], "one value"),
        ("IOU_LABELS", [0, -1], "one value"),
    ],
)
def test_bad_configs(key, value, message):
    with pytest.raises(ValueError, match=message):
        ProposalLabeler(mimicdet_cfg(**{f"MODEL.ROI_HEADS.{key}": value}))
