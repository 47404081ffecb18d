"""What counts as the same detections."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from kd_d2.export.comparison import Tolerance, compare_detections, compare_with_model
from kd_d2.export.graph import Detections

BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [5, 5, 9, 9]])
SCORES = torch.tensor([0.9, 0.8, 0.3])
CLASSES = torch.tensor([1, 0, 1])
TOLERANCE = Tolerance(box=0.1, score=1e-3)


def expected(boxes=BOXES, scores=SCORES, classes=CLASSES):
    return Instances((50, 50), pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)


def found(boxes=BOXES, scores=SCORES, classes=CLASSES, room=5):
    """A batch with an empty image first."""
    count, padding = len(scores), room - len(scores)
    rows = [torch.cat((x, x.new_zeros(padding, *x.shape[1:]))) for x in (boxes, scores, classes)]
    return Detections(torch.tensor([0, count]), *(torch.stack((0 * x, x)) for x in rows))


def compare(detections, instances=None):
    return compare_detections(instances or expected(), detections, 1, TOLERANCE)


def test_equal_detections():
    assert compare(found()) == (0.0, 0.0, "")


def test_largest_differences_are_reported():
    shifted = BOXES.clone()
    shifted[1, 3] += 0.0625
    box, score, wrong = compare(found(shifted, SCORES - torch.tensor([0, 0, 0.0005])))
    assert (box, wrong) == (0.0625, "") and score == pytest.approx(0.0005, abs=1e-6)


@pytest.mark.parametrize(
    "detections, message",
    [
        (found(BOXES + 0.5), "boxes differ by 0.5 px"),
        (found(scores=SCORES - 0.1), "scores by 0.1"),
        (found(classes=torch.tensor([1, 2, 1])), "no detection of class 0 is left"),
        (found(BOXES[:2], SCORES[:2], CLASSES[:2]), "2 detections instead of 3"),
        (found(BOXES * float("nan")), "boxes differ by nan"),
    ],
)
def test_what_differs(detections, message):
    assert message in compare(detections)[2]


def test_a_detection_pairs_only_once():
    boxes = BOXES[[0, 0]]
    both = expected(boxes + torch.tensor([[0.0], [20.0]]), SCORES[[0, 0]], CLASSES[[0, 0]])
    assert "px" in compare(found(boxes, SCORES[[0, 0]], CLASSES[[0, 0]]), both)[2]


def test_equal_scores_in_another_order():
    scores = torch.tensor([0.5, 0.5, 0.5])
    order = [2, 0, 1]
    other = found(BOXES[order], scores, CLASSES[order])
    assert compare(other, expected(scores=scores))[2] == ""


def test_a_tenth_of_a_full_list_may_end_differently():
    """Ten equal boxes of falling score, but for some that are elsewhere."""
    scores = torch.cat((torch.linspace(0.9, 0.5, 8), torch.tensor([0.3, 0.3])))
    boxes, classes = BOXES[:1].repeat(10, 1), torch.zeros(10, dtype=torch.long)
    same = expected(boxes, scores, classes)

    def moved(*rows):
        other = boxes.clone()
        other[list(rows)] += 30
        return other

    assert compare(found(moved(9), scores, classes, room=10), same)[2] == ""
    assert compare(found(moved(8), scores, classes, room=10), same)[2] == ""
    # two of them, one that is not at the end, and a list that is not full
    assert "px" in compare(found(moved(8, 9), scores, classes, room=10), same)[2]
    assert "px" in compare(found(moved(7), scores, classes, room=10), same)[2]
    assert "px" in compare(found(moved(9), scores, classes, room=11), same)[2]


class Bright(nn.Module):
    """Finds one object in every image, as large as the image."""

    def forward(self, inputs):
        height, width = inputs[0]["image"].shape[-2:]
        box = torch.tensor([[0.0, 0, width, height]])
        return [{"instances": expected(box, SCORES[:1], CLASSES[:1])}]


def runtime(height, width, fails=False):
    """A graph that only fits one size, or fails on others."""

    def run(images):
        if fails and images.shape[-2:] != (height, width):
            raise RuntimeError("no such size")
        size = torch.tensor([[[0.0, 0, width, height]]]).expand(len(images), 1, 4)
        return Detections(
            torch.ones(len(images), dtype=torch.long),
            size,
            SCORES[:1].expand(len(images), 1),
            CLASSES[:1].expand(len(images), 1),
        )

    return run


def test_a_graph_of_one_size_is_noticed():
    images = [torch.zeros(3, 40, 60, dtype=torch.uint8)]
    result = compare_with_model(runtime(40, 60), Bright(), images)
    # the image itself, and two images of another size, 30 x 40
    assert (result.num_batches, result.num_detections) == (2, 3)
    assert len(result.failures) == 2 and result.box_difference == 20
    assert result.failures[0].startswith("batch of a part of image 1 (30x40 px), image 1 of 2: ")
    assert "3 detections in 2 batches, largest difference 20 px" in result.describe()
    result = compare_with_model(runtime(40, 60, fails=True), Bright(), images)
    assert result.failures == [
        "batch of a part of image 1 (30x40 px): the graph does not run: no such size"
    ]
