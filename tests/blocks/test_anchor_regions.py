"""NearAnchor and VLR: worked-out masks, and loops over anchors and boxes."""

import math

import pytest
import torch
from detectron2.structures import Boxes

from kd_d2.blocks import VLR, Complement, NearAnchor, PairTerm, Product, SquaredL2, Weights
from kd_d2.blocks.pair import Pair
from kd_d2.blocks.sources import Source
from tests.blocks.support import ToyView, cell_grid, map_pair, row_pair, square_anchors, toy_ctx

TOY = (cell_grid(8, 4),)
PLUS = {(1, 1), (0, 1), (1, 0), (1, 2), (2, 1)}
BLOCK = {(y, x) for y in range(3) for x in range(3)}
GRIDS = (cell_grid(8, 12, 8), cell_grid(16, 6, 4), cell_grid(32, 3, 2))
STRIDES = (8, 16, 32)
SIZES = [(96, 64), (70, 50), (96, 64)]
GT = [
    [[3.5, 7.0, 40.25, 61.0], [20.0, 20.0, 24.0, 90.0], [1.0, 1.0, 62.0, 95.0]],
    [[0.0, 0.0, 50.0, 70.0], [10.0, 10.0, 10.0, 10.0], [-9.0, 30.0, 5.0, 60.0]],
    [],
]


def _toy_student():
    return ToyView({"anchors": [square_anchors(TOY[0])]})


def _student(sizes=(1.5, 4.0)):
    return ToyView({"anchors": [square_anchors(g, sizes) for g in GRIDS]}, STRIDES)


def _mask(region, boxes):
    return region(toy_ctx([boxes], student=_toy_student()), map_pair(TOY))[0]


def _cells(mask):
    return {(y, x) for y, x in mask.nonzero().tolist()}


def _iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    inter = width * height
    areas = [(r[2] - r[0]) * (r[3] - r[1]) for r in (a, b)]
    return inter / (sum(areas) - inter) if inter else 0.0


@pytest.mark.parametrize("scope", ["all", "own", "each", "map"])
def test_near_anchor_worked_out(scope):
    gt = [[0.0, 0, 24, 24]]  # IoU .4444 at the centre, .3 beside it, .2093 diagonally
    assert _cells(_mask(NearAnchor(0.5, scope), gt)) == PLUS
    assert _cells(_mask(NearAnchor(0.3, scope), gt)) == BLOCK
    assert _cells(_mask(NearAnchor(0.15, scope), gt)) > BLOCK  # (3, 1): .0833 > .0667
    assert not _mask(NearAnchor(0.5, scope), []).any()
    # no anchor overlaps them: the largest IoU is 0 and marks nothing
    assert not _mask(NearAnchor(0.0, scope), [[90, 90, 99, 99], [5, 5, 5, 5]]).any()


@pytest.mark.parametrize("scope", ["all", "own", "each", "map"])
def test_near_anchor_excludes_the_bound_itself(scope):
    grid = (cell_grid(8, 1, 2),)
    anchors = Boxes(torch.tensor([[0.0, 0, 8, 8], [0, 0, 16, 16]]))  # IoU 1 and 1/4
    ctx = toy_ctx([[[0.0, 0, 8, 8]]], student=ToyView({"anchors": [anchors]}))
    for threshold, expected in ((0.25, [1, 0]), (0.249, [1, 1]), (0.0, [1, 1])):
        found = NearAnchor(threshold, scope)(ctx, map_pair(grid))
        assert found.flatten().tolist() == expected


def _naive_near(threshold, scope, boxes, anchors, level):
    """Set of the cells' anchors that are on, by index within the level."""
    on = set()
    for box in boxes:
        area = max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
        own = min(max(math.floor(math.log2(math.sqrt(area) / 56 + 1e-6)), 0), len(anchors) - 1)
        ious = [[_iou(box, anchor) for anchor in x.tensor.tolist()] for x in anchors]
        if scope == "own" and own != level:
            continue
        best = max(map(max, ious)) if scope == "all" else max(ious[level])
        on |= {i for i, iou in enumerate(ious[level]) if iou > threshold * best}
    return on


@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize("scope", ["all", "own", "each"])
def test_near_anchor_equals_a_loop(scope, threshold):
    student = _student()
    anchors = student["anchors"]
    region, ctx = NearAnchor(threshold, scope), toy_ctx(GT, SIZES, student)
    rows = region(ctx, row_pair(GRIDS, 2, images=3)).split([len(x) for x in anchors], dim=1)
    marked = 0
    for level, grid in enumerate(GRIDS):
        found = region(ctx, map_pair(GRIDS, level, 3))
        for image, boxes in enumerate(GT):
            on = {i // 2 for i in _naive_near(threshold, scope, boxes, anchors, level)}
            expected = {divmod(cell, grid.width) for cell in on}
            assert _cells(found[image]) == expected, (level, image)
            marked += len(expected)
            # all anchors of a marked cell count, not only the near one
            both = rows[level][image].view(-1, 2)
            assert set(both[:, 0].nonzero().flatten().tolist()) == on
            assert torch.equal(both[:, 0], both[:, 1])
    assert marked > 10


def test_scope_all_looks_at_levels_that_are_not_compared():
    student = _student((1.0,))
    box = [[32.0, 0.0, 64.0, 32.0]]  # an anchor of the coarsest level; IoU 1/16 on the finest
    sizes = [(96, 64)]
    fine = (GRIDS[0],)
    everything = NearAnchor(0.5, "all")(toy_ctx([box], sizes, student), map_pair(fine))
    alone = NearAnchor(0.5, "each")(toy_ctx([box], sizes, student), map_pair(fine))
    together = NearAnchor(0.5, "all")(toy_ctx([box], sizes, student), map_pair(GRIDS, 0))
    assert torch.equal(everything, together)
    assert everything.sum() == 0 and alone.sum() == 16


def test_near_anchor_counts_anchors_across_the_border():
    # the best anchor of a box in the corner reaches 4 pixels over the border on both sides
    assert _cells(_mask(NearAnchor(0.9), [[0.0, 0, 12, 12]])) == {(0, 0)}


@pytest.mark.parametrize("arguments", [(-0.1,), (1.0,), (0.5, "fpn")])
def test_near_anchor_refuses(arguments):
    with pytest.raises(ValueError, match="NearAnchor: (threshold|scope) must"):
        NearAnchor(*arguments)


def test_scope_map_is_for_one_map():
    ctx = toy_ctx(GT, SIZES, _student())
    with pytest.raises(ValueError, match='scope="map".*3 levels.*scope="each"'):
        NearAnchor(0.5, "map")(ctx, map_pair(GRIDS, 0, 3))
    one = (GRIDS[1],)
    expected = NearAnchor(0.5, "each")(ctx, map_pair(one, 0, 3))
    assert torch.equal(NearAnchor(0.5, "map")(ctx, map_pair(one, 0, 3)), expected)


def test_levels_without_anchors_are_named():
    ctx = toy_ctx(GT, SIZES, _student())
    grids = (cell_grid(4, 24, 16), *GRIDS)
    for region in (NearAnchor(), VLR()):
        with pytest.raises(ValueError, match=r"strides \(8, 16, 32\), none at \(4,\).*levels="):
            region(ctx, map_pair(grids, 0, 3))


def test_vlr_worked_out():
    # theta .275739 + .077839; DIoU .252941 beside the centre, .127669 diagonally
    found = _mask(VLR(), [[0.0, 0, 24, 24]])
    assert _cells(found) == BLOCK - {(1, 1)}
    for y, x in BLOCK - {(1, 1)}:
        expected = 0.3 if (y, x) in PLUS else 0.209302
        assert found[y, x].item() == pytest.approx(expected, abs=1e-6)
    assert not _mask(VLR(), []).any()
    # the diagonals' DIoU .127669 lies below .5 * .353578
    assert _cells(_mask(VLR(gamma=0.5), [[0.0, 0, 24, 24]])) == PLUS - {(1, 1)}


def test_vlr_gamma_bound_is_inclusive_and_the_threshold_is_not():
    anchors = square_anchors(TOY[0]).tensor.tolist()
    box = [0.0, 0, 24, 24]
    ious = sorted((_iou(box, a) for a in anchors), reverse=True)[:9]
    mean = sum(ious) / 9
    theta = mean + (sum((x - mean) ** 2 for x in ious) / 8) ** 0.5
    assert theta == pytest.approx(0.353578, abs=1e-6)
    at_edge = 0.252941 / theta
    assert (0, 1) in _cells(_mask(VLR(gamma=at_edge - 1e-4), [box]))
    assert (0, 1) not in _cells(_mask(VLR(gamma=at_edge + 1e-4), [box]))


def test_positives_can_be_taken_out_of_a_region():
    # what the RetinaNet variant of LD does, with a region of its own as the positives
    box = [[0.0, 0, 24, 24]]
    near = NearAnchor(0.5)
    found = _mask(Product(VLR(), Complement(near)), box)
    assert _cells(found) == BLOCK - PLUS
    assert found[0, 0].item() == pytest.approx(0.209302, abs=1e-6)


class _Differs(Source):
    """Two channels of .1 against 0 on the toy map."""

    widths = ((2, 2),)

    def __call__(self, ctx):
        student = torch.full((1, 2, 4, 4), 0.1)
        return [Pair(student, torch.zeros_like(student), True, TOY, 0, "neck")]


@pytest.mark.parametrize(
    "region, normaliser, expected",
    [
        (NearAnchor(0.5), Weights(2.0), 0.01),  # FGFI
        (NearAnchor(0.5), Weights(2.0, channels=True, floor=1.0), 0.005),  # DeFeat
        (Complement(NearAnchor(0.5)), Weights(2.0, channels=True, floor=1.0), 0.005),
    ],
)
def test_masked_losses_worked_out(region, normaliser, expected):
    term = PairTerm(_Differs(), region=region, distance=SquaredL2(), normaliser=normaliser)
    ctx = toy_ctx([[[0.0, 0, 24, 24]]], student=_toy_student())
    assert term(ctx).item() == pytest.approx(expected, abs=1e-7)
