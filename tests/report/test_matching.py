"""Right and wrong detections of single images, worked out by hand."""

import numpy as np
import pytest

from kd_d2.report.matching import Box, match, paired_iou

SQUARE = (0.0, 0.0, 10.0, 10.0)


def test_iou():
    others = [SQUARE, (5.0, 0.0, 15.0, 10.0), (20.0, 0.0, 30.0, 10.0), (3.0, 3.0, 3.0, 3.0)]
    assert paired_iou([SQUARE], others)[0] == pytest.approx([1, 1 / 3, 0, 0])
    assert paired_iou([], others).shape == (0, 4) and paired_iou([SQUARE], []).shape == (1, 0)
    assert np.isfinite(paired_iou(others[3:], others[3:])).all()


def test_every_object_is_found_once():
    truth = [Box(SQUARE, 0), Box((20.0, 0.0, 30.0, 10.0), 1)]
    detections = [
        Box((0.0, 0.0, 10.0, 6.0), 0, 0.5),  # IoU 0.6, but the next one has the object
        Box((0.0, 0.0, 10.0, 9.0), 0, 0.9),
        Box((20.0, 0.0, 30.0, 10.0), 0, 0.8),  # wrong class
        Box((0.0, 0.0, 10.0, 4.0), 0, 0.7),  # IoU 0.4
    ]
    found = match(detections, truth)
    assert found.right == ["wrong", "right", "wrong", "wrong"]
    assert found.by == [0.9, None]


def test_the_largest_overlap_is_taken():
    truth = [Box((0.0, 0.0, 10.0, 7.0), 0), Box(SQUARE, 0)]
    found = match([Box((0.0, 0.0, 10.0, 9.0), 0, 0.9)], truth)
    assert found.by == [None, 0.9]


def test_a_lower_score_changes_nothing_above_it():
    truth = [Box(SQUARE, 0)]
    first = match([Box((0.0, 0.0, 10.0, 8.0), 0, 0.9)], truth)
    both = match([Box((0.0, 0.0, 10.0, 8.0), 0, 0.9), Box(SQUARE, 0, 0.2)], truth)
    assert both.right == [*first.right, "wrong"] and both.by == first.by == [0.9]


def test_crowds_are_not_judged():
    crowd = Box((0.0, 0.0, 100.0, 100.0), 0, crowd=True)
    found = match([Box(SQUARE, 0, 0.9), Box(SQUARE, 1, 0.8)], [crowd])
    assert found.right == ["crowd", "wrong"] and found.by == [None]


def test_without_anything():
    assert match([], []) == ([], [])
