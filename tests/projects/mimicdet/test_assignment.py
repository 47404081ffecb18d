"""Assignment of ground truth to anchors: values by hand, and loops over anchors and boxes."""

import math

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, pairwise_iou

from kd_d2.projects.mimicdet.assignment import CenterAssigner

from .refinement_cases import GROUND_TRUTH, POSITIVES, SIDES, STRIDES, grids


def anchors_of(size=(512, 512)):
    generator = DefaultAnchorGenerator(
        sizes=[[x] for x in SIDES], aspect_ratios=[[1.0]], strides=STRIDES, offset=0.5
    )
    return generator([torch.zeros(1, 1, *grid) for grid in grids(size)])


def assign(boxes, size=(512, 512), **options):
    boxes = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    return CenterAssigner(anchor_sides=SIDES, **options)(anchors_of(size), boxes)


def assign_by_loops(boxes, size=(512, 512), eta=(1.0, 2.0), ratio=0.3, fallback=False):
    """The same in Python: each cell looks for the smallest box that passes both tests."""
    cells = [
        (level, (x + 0.5) * STRIDES[level], (y + 0.5) * STRIDES[level])
        for level, (height, width) in enumerate(grids(size))
        for y in range(height)
        for x in range(width)
    ]

    def right_level(box, level):
        scale = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        low = 0 if level == 0 else SIDES[level] * eta[0]
        return low <= scale and (level == len(SIDES) - 1 or scale < SIDES[level] * eta[1])

    def offsets(box, x, y):
        return abs(x - (box[0] + box[2]) / 2), abs(y - (box[1] + box[3]) / 2)

    pairs = set()
    for number, box in enumerate(boxes):
        own = set()
        for index, (level, x, y) in enumerate(cells):
            dx, dy = offsets(box, x, y)
            inside = dx <= ratio / 2 * (box[2] - box[0]) and dy <= ratio / 2 * (box[3] - box[1])
            if right_level(box, level) and inside:
                own.add((index, number))
        if fallback and not own:
            near = [
                (math.hypot(*offsets(box, x, y)), index)
                for index, (level, x, y) in enumerate(cells)
                if right_level(box, level)
            ]
            own = {(min(near)[1], number)} if near else set()
        pairs |= own
    result = [-1] * len(cells)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes]
    for index, number in sorted(pairs):
        best = result[index]
        if best < 0 or areas[number] < areas[best]:
            result[index] = number
    return result


def positives(assigned, count):
    return [(assigned == number).nonzero().flatten().tolist() for number in range(count)]


def test_eight_boxes():
    assigned = assign(GROUND_TRUTH)
    assert assigned.dtype == torch.int64 and len(assigned) == 5456
    assert positives(assigned, 8) == [list(x) for x in POSITIVES]
    assert int((assigned >= 0).sum()) == 16
    assert assigned.tolist() == assign_by_loops(GROUND_TRUTH)


def test_targets_of_the_eight_boxes():
    anchors = Boxes.cat(anchors_of())
    boxes = torch.tensor(GROUND_TRUTH, dtype=torch.float32)
    index = torch.tensor([975, 4361, 5188, 390])
    transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    targets = transform.get_deltas(anchors[index].tensor, boxes[assign(GROUND_TRUTH)[index]])
    expected = [
        [0, 0, 0.4055, 0.4055],
        [-0.125, 0.125, 0.4055, 0.4055],
        [-0.0312, 0.0469, -0.2469, 0.3409],
        [0, 0, -0.6931, -0.6931],
    ]
    torch.testing.assert_close(targets, torch.tensor(expected), atol=6e-5, rtol=0)
    iou = pairwise_iou(anchors[torch.tensor([975, 5188, 5445])], Boxes(boxes)).max(dim=1).values
    torch.testing.assert_close(iou, torch.tensor([0.4444, 0.593, 0.6203]), atol=6e-5, rtol=0)


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize(
    "eta, ratio", [((1.0, 2.0), 0.3), ((0.7, 3.0), 0.5), ((1.2, 1.6), 1.0)], ids=str
)
@pytest.mark.parametrize("seed", [0, 1])
def test_random_boxes_equal_the_loops(seed, eta, ratio, fallback):
    # eta: as the paper's, with overlapping ranges, with gaps
    generator = torch.Generator().manual_seed(seed)
    size = (320, 256)
    sides = 4 * 2 ** (6 * torch.rand(12, 2, generator=generator))
    centers = torch.rand(12, 2, generator=generator) * torch.tensor([256.0, 320.0])
    boxes = torch.cat((centers - sides / 2, centers + sides / 2), dim=1)
    boxes = torch.cat((boxes, boxes[:3]))  # equal areas, equal positions
    options = {"eta": eta, "center_ratio": ratio, "fallback_nearest": fallback}
    assigned = assign(boxes, size, **options)
    expected = assign_by_loops(boxes.tolist(), size, eta, ratio, fallback)
    assert assigned.tolist() == expected
    assert any(x >= 0 for x in expected)
    # of equal boxes the first has all
    assert not set(range(12, 15)) & set(expected) or fallback


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_smallest_box_wins_in_any_order(order):
    # concentric around the centre of cell (8, 8) of P3, all three on this level
    boxes = [[68 - s, 68 - s, 68 + s, 68 + s] for s in (28, 20)]
    assigned = assign([boxes[i] for i in order])
    assert assigned[8 * 64 + 8] == order.index(1)


def test_no_ground_truth():
    for fallback in (False, True):
        assigned = assign([], fallback_nearest=fallback)
        assert assigned.tolist() == [-1] * 5456 and assigned.dtype == torch.int64


@pytest.mark.parametrize(
    "side, level",
    [(63.99, 0), (64, 1), (127.99, 1), (128, 2), (256, 3), (512, 4), (1500, 4), (20, 0)],
)
def test_ranges_are_half_open_and_the_outer_ones_unbounded(side, level):
    center = 260
    half = side / 2
    assigned = assign([[center - half, center - half, center + half, center + half]])
    starts = [0, 4096, 5120, 5376, 5440]
    levels = {max(i for i in range(5) if starts[i] <= x) for x in positives(assigned, 1)[0]}
    assert levels == {level}


def test_fallback_gives_only_the_boxes_without_anchor_the_nearest_one():
    paper, ours = assign(GROUND_TRUTH), assign(GROUND_TRUTH, fallback_nearest=True)
    changed = (paper != ours).nonzero().flatten().tolist()
    # box 3, centre (46, 46): cell (5, 5) of P3 has its centre at (44, 44)
    assert changed == [5 * 64 + 5] and ours[changed].tolist() == [3]
    # in the middle between four cells: the first of them
    assert positives(assign([[44, 44, 52, 52]], fallback_nearest=True), 1) == [[5 * 64 + 5]]
    # a smaller box keeps its cell, also from one that has no other; smaller again: it takes it
    cell = [44 - 8, 44 - 8, 44 + 8, 44 + 8]
    larger, smaller = [10, 42, 82, 47], [46 - 2, 46 - 2, 46 + 2, 46 + 2]
    assert positives(assign([cell, larger], fallback_nearest=True), 2)[0] == [5 * 64 + 5]
    assert positives(assign([cell, smaller], fallback_nearest=True), 2) == [[], [5 * 64 + 5]]


@pytest.mark.parametrize(
    "options, word",
    [
        ({"eta": (2.0, 1.0)}, "ETA"),
        ({"eta": (1.0,)}, "ETA"),
        ({"center_ratio": 0.0}, "CENTER_RATIO"),
        ({"center_ratio": 1.1}, "CENTER_RATIO"),
    ],
)
def test_bad_values(options, word):
    with pytest.raises(ValueError, match=f"REFINE.{word} .* got"):
        CenterAssigner(anchor_sides=SIDES, **options)
