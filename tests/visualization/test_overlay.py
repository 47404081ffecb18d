"""Pictures of an image's own size with the boxes where they belong."""

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from kd_d2.visualization import draw_overlay, overlay_size, side_by_side


def detections(boxes, scores, classes, size=(90, 121)):
    result = Instances(size)
    result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    result.scores = torch.tensor(scores)
    result.pred_classes = torch.tensor(classes, dtype=torch.long)
    return result


GREY = np.full((90, 121, 3), 128, dtype=np.uint8)


def changed(picture):
    """Rows and columns of the pixels that are no longer grey."""
    return [set(x.tolist()) for x in np.nonzero((picture != 128).any(axis=2))]


def test_boxes_are_drawn_where_they_are():
    found = detections([[60, 30, 100, 80], [5, 5, 20, 20]], [0.9, 0.4], [0, 1])
    picture = draw_overlay(GREY, found, ["a", "b"], score_threshold=0.5)
    assert picture.shape == GREY.shape and picture.dtype == np.uint8
    rows, columns = changed(picture)
    # the second one is below the threshold; a label stands inside the first one's corner
    assert min(rows) >= 28 and 79 <= max(rows) <= 82
    assert 58 <= min(columns) <= 60 and max(columns) <= 120
    assert (GREY == 128).all()
    assert {5, 20} <= changed(draw_overlay(GREY, found, (), score_threshold=0.3))[1]


def test_nothing_detected_changes_nothing():
    assert np.array_equal(draw_overlay(GREY, detections([], [], [])), GREY)


def test_a_class_has_one_colour():
    def edge(classes):
        found = detections([[60, 30, 100, 80]], [0.9], classes)
        return draw_overlay(GREY, found)[60, 100].tolist()

    assert edge([1]) == edge([1]) and edge([1]) != edge([2])
    assert edge([1]) == edge([75])  # 74 colours


def test_smaller_and_larger_pictures():
    found = detections([[60, 30, 100, 80]], [0.9], [0])
    picture = draw_overlay(GREY, found, max_size=60)
    assert picture.shape[:2] == overlay_size(90, 121, 60) == (44, 60)
    rows, columns = changed(picture)
    assert 28 <= min(columns) <= 30 and 39 <= max(rows) <= 41
    enlarged = draw_overlay(GREY, found, min_size=242)
    assert enlarged.shape[:2] == overlay_size(90, 121, 0, 242) == (180, 242)
    assert 118 <= min(changed(enlarged)[1]) <= 120
    assert overlay_size(90, 121, 100, 80) == overlay_size(90, 121, 100) == (74, 100)
    assert overlay_size(90, 121, 500) == overlay_size(90, 121) == (90, 121)


def test_side_by_side():
    first, second = np.zeros((2, 3, 3), np.uint8), np.ones((2, 3, 3), np.uint8)
    picture = side_by_side([first, second], gap=1)
    assert picture[0, :, 0].tolist() == [0, 0, 0, 255, 1, 1, 1] and picture.shape == (2, 7, 3)
    assert side_by_side([second]) is not second and np.array_equal(side_by_side([second]), second)
