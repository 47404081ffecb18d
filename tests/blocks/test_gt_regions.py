"""Regions of ground-truth boxes: worked-out masks, and a loop over cells and boxes."""

import math

import pytest
import torch

from kd_d2.blocks import (
    Complement,
    Gaussian,
    GTCells,
    GTCentre,
    ScaledBackground,
    ScaledGT,
    build_block,
    fpn_level,
)
from kd_d2.blocks.registry import KD_REGIONS
from tests.blocks.support import ToyView, cell_grid, map_pair, row_pair, square_anchors, toy_ctx

TOY = (cell_grid(8, 4),)
# three levels of a padded batch of 96x64 pixels
GRIDS = (cell_grid(8, 12, 8), cell_grid(16, 6, 4), cell_grid(32, 3, 2))
SIZES = [(96, 64), (70, 50), (96, 64), (40, 64)]
GT = [
    [[3.5, 7.0, 40.25, 61.0], [20.0, 20.0, 24.0, 90.0], [33.0, 1.0, 63.0, 95.0]],
    [[0.0, 0.0, 50.0, 70.0], [10.0, 10.0, 10.0, 10.0], [45.0, 30.0, 49.0, 60.0]],
    [],
    # beyond every border, wholly outside, and thinner than any cell
    [[-20.0, -9.0, 30.0, 12.0], [200.0, 10.0, 220.0, 30.0], [40.0, 31.0, 90.0, 130.0]]
    + [[-30.0, -30.0, -8.0, -8.0], [17.0, 2.0, 60.0, 3.0]],
]
REGIONS = [
    "GTCells",
    "GTCells(levels='fpn')",
    "Gaussian",
    "Gaussian(levels='fpn')",
    "Gaussian(center_cell=True)",
    "ScaledGT",
    "ScaledGT(scale='image')",
]


def _map(region, boxes, level=0, grids=TOY, sizes=None):
    return region(toy_ctx([boxes], sizes), map_pair(grids, level))[0]


def _cells(mask):
    return {(y, x) for y, x in mask.nonzero().tolist()}


def _naive_level(box, num_levels):
    area = max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
    return min(max(math.floor(math.log2(math.sqrt(area) / 56 + 1e-6)), 0), num_levels - 1)


def _naive_cells(box, grid):
    """(first, last + 1) per axis, and whether it is the single cell of an empty range."""
    lx, ly, rx, ry = (int(v / grid.stride) for v in box)
    lx, ly = min(max(lx, 0), grid.width - 1), min(max(ly, 0), grid.height - 1)
    rx, ry = min(rx, grid.width), min(ry, grid.height)
    if rx <= lx or ry <= ly:
        return lx, ly, lx + 1, ly + 1, True
    return lx, ly, rx, ry, False


def _naive_weight(name, box, grid, size, y, x):
    if name.startswith("ScaledGT"):
        fx = fy = 1 / grid.stride
        if "image" in name:
            fx, fy = grid.width / size[1], grid.height / size[0]
        low = math.floor(box[1] * fy), math.floor(box[0] * fx)
        high = math.ceil(box[3] * fy), math.ceil(box[2] * fx)
        inside = low[0] <= y <= high[0] and low[1] <= x <= high[1]
        return inside / (high[0] - low[0] + 1) / (high[1] - low[1] + 1)
    lx, ly, rx, ry, single = _naive_cells(box, grid)
    if not (ly <= y < ry and lx <= x < rx):
        return 0.0
    if name.startswith("GTCells") or single:
        return 1.0
    shift = 0.5 if "center_cell" in name else 0.0
    result = 1.0
    for offset, count in ((y - ly, ry - ly), (x - lx, rx - lx)):
        result *= math.exp(-0.5 * ((offset + shift - count / 2) / (count / 2)) ** 2)
    return result


@pytest.mark.parametrize("name", REGIONS)
def test_every_cell_has_the_weight_that_a_loop_finds(name):
    region = build_block(KD_REGIONS, name, "test")
    ctx = toy_ctx(GT, SIZES)
    for level, grid in enumerate(GRIDS):
        found = region(ctx, map_pair(GRIDS, level, len(GT)))
        assert found.dtype == torch.float32 and not found.requires_grad
        for image, (boxes, size) in enumerate(zip(GT, SIZES)):
            if "fpn" in name:
                boxes = [box for box in boxes if _naive_level(box, len(GRIDS)) == level]
            for y in range(grid.height):
                for x in range(grid.width):
                    weights = [_naive_weight(name, box, grid, size, y, x) for box in boxes]
                    expected = max(weights, default=0.0)
                    assert found[image, y, x].item() == pytest.approx(expected, abs=1e-6), (
                        (level, image, y, x),
                        boxes,
                    )


def test_levels_of_boxes_by_their_size():
    # the formula adds 1 to either side: 31 pixels count as 32
    sides = torch.tensor([32.0, 112, 224, 223, 448, 5000]) - 1
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert fpn_level(boxes, 5).tolist() == [0, 1, 2, 1, 3, 4]
    assert fpn_level(boxes, 3).tolist() == [0, 1, 2, 1, 2, 2]
    assert fpn_level(torch.tensor([[10.0, 10, 10, 10], [10, 10, 0, 0]]), 5).tolist() == [0, 0]


def test_fpn_puts_every_box_on_one_level():
    boxes = [[0.0, 0, 30, 30], [0, 0, 63, 95]]  # levels 0 and 0, then 1 with 78 pixels: 0
    boxes.append([0.0, 0.0, 130.0, 130.0])  # 131 / 56: level 1
    masks = [_map(GTCells("fpn"), boxes, level, GRIDS, [(96, 64)]) for level in range(3)]
    assert masks[0].any() and masks[1].all() and not masks[2].any()
    everywhere = [_map(GTCells("all"), boxes, level, GRIDS, [(96, 64)]) for level in range(3)]
    assert all(mask.any() for mask in everywhere)


def test_gt_cells_worked_out():
    assert _cells(_map(GTCells(), [[8, 8, 20, 20]])) == {(1, 1)}
    assert _cells(_map(GTCells(), [[0, 0, 24, 24]])) == {(y, x) for y in range(3) for x in range(3)}
    # no whole cell in x: the single cell, although it is two cells high
    assert _cells(_map(GTCells(), [[9, 8, 15, 24]])) == {(1, 1)}
    assert _cells(_map(GTCells(), [[5, 5, 5, 5], [-9, -9, 100, 4]])) == {(0, 0)}
    background = _map(Complement(GTCells()), [[8, 8, 20, 20]])
    assert background.sum() == 15 and background[1, 1] == 0


def test_gaussian_worked_out():
    found = _map(Gaussian(), [[0, 0, 32, 32]])
    torch.testing.assert_close(
        found[0], torch.tensor([0.36788, 0.53526, 0.60653, 0.53526]), atol=5e-6, rtol=0
    )
    assert found.max() == 1 and found.argmax() == 2 * 4 + 2
    symmetric = _map(Gaussian(center_cell=True), [[0, 0, 32, 32]])
    torch.testing.assert_close(symmetric, symmetric.flip(0).flip(1))
    assert _cells(_map(Gaussian(), [[9, 8, 15, 24]])) == {(1, 1)}
    assert _map(Gaussian(), [[9, 8, 15, 24]])[1, 1] == 1


@pytest.mark.parametrize("scale", ["stride", "image"])
def test_scaled_boxes_worked_out(scale):
    region = ScaledGT(scale)
    for boxes, expected in (
        ([[8, 8, 20, 20]], {(y, x): 1 / 9 for y in (1, 2, 3) for x in (1, 2, 3)}),
        ([[8, 8, 16, 16]], {(y, x): 1 / 4 for y in (1, 2) for x in (1, 2)}),
        # the number of cells includes the fifth row and column, which the map does not have
        ([[16, 16, 32, 32]], {(y, x): 1 / 9 for y in (2, 3) for x in (2, 3)}),
    ):
        found = _map(region, boxes)
        assert _cells(found) == set(expected)
        for (y, x), value in expected.items():
            assert found[y, x].item() == pytest.approx(value)
    both = _map(region, [[8, 8, 20, 20], [16, 16, 24, 24]])
    assert both[2:, 2:].tolist() == [[0.25] * 2] * 2
    assert both[1, 1:].tolist() == pytest.approx([1 / 9] * 3)
    assert both.sum().item() == pytest.approx(4 / 4 + 5 / 9)


def test_scaled_background():
    region = ScaledBackground()
    found = _map(region, [[8, 8, 20, 20]])
    foreground = _map(ScaledGT(), [[8, 8, 20, 20]])
    assert (found > 0).sum() == 7 and torch.equal(found > 0, foreground == 0)
    assert found.max().item() == pytest.approx(1 / 7)
    assert _map(region, [[0, 0, 32, 32]]).sum() == 0  # no background: no division by zero
    assert _map(region, []).tolist() == [[1 / 16] * 4] * 4
    # every image by itself
    two = region(toy_ctx([[[8, 8, 20, 20]], []]), map_pair(TOY, images=2))
    assert two.sum(dim=(1, 2)).tolist() == pytest.approx([1, 1])


def test_scale_image_stretches_boxes_of_padded_images():
    box = [[16.0, 16.0, 24.0, 24.0]]
    padded = [(16, 32)]  # half the height of the map
    stretched = _map(ScaledGT("image"), box, sizes=padded)
    exact = _map(ScaledGT("stride"), box, sizes=padded)
    assert _cells(exact) == {(y, x) for y in (2, 3) for x in (2, 3)}
    assert _cells(stretched) == set()  # rows 4..6 lie below the map


def test_gt_centre_excludes_the_border():
    anchors = [square_anchors(TOY[0])]
    student = ToyView({"anchors": anchors})

    def mask(boxes):
        return GTCentre()(toy_ctx([boxes], student=student), map_pair(TOY))[0]

    assert _cells(mask([[0, 0, 24, 24]])) == {(y, x) for y in range(3) for x in range(3)}
    assert _cells(mask([[4, 4, 20, 20]])) == {(1, 1)}  # centres at 4 and 20 are on the border
    assert _cells(mask([[4, 4, 20, 20], [20, 20, 31, 31]])) == {(1, 1), (3, 3)}
    assert not mask([]).any() and not mask([[12, 12, 12, 12]]).any()


def test_gt_centre_equals_a_loop_on_all_levels():
    offset, sizes = 0.5, (1.0, 4.0)
    anchors = [square_anchors(grid, sizes, offset) for grid in GRIDS]
    student = ToyView({"anchors": anchors}, strides=(8, 16, 32))
    ctx, region = toy_ctx(GT, SIZES, student), GTCentre()
    rows = region(ctx, row_pair(GRIDS, 2, images=len(GT)))
    start = 0
    for level, grid in enumerate(GRIDS):
        cells = region(ctx, map_pair(GRIDS, level, len(GT)))
        for image, boxes in enumerate(GT):
            for y in range(grid.height):
                for x in range(grid.width):
                    cx, cy = (x + offset) * grid.stride, (y + offset) * grid.stride
                    on = any(b[0] < cx < b[2] and b[1] < cy < b[3] for b in boxes)
                    assert cells[image, y, x] == on
                    row = start + 2 * (y * grid.width + x)
                    assert rows[image, row] == rows[image, row + 1] == on
        start += 2 * grid.height * grid.width


@pytest.mark.parametrize("name", REGIONS + ["ScaledBackground"])
def test_rows_are_the_cells_in_the_order_of_the_anchors(name):
    region, ctx = build_block(KD_REGIONS, name, "test"), toy_ctx(GT, SIZES)
    levels = [region(ctx, map_pair(GRIDS, level, len(GT))) for level in range(3)]
    for anchors_per_cell in (1, 3):
        rows = region(ctx, row_pair(GRIDS, anchors_per_cell, images=len(GT)))
        expected = [x[..., None].expand(*x.shape, anchors_per_cell).flatten(1) for x in levels]
        assert torch.equal(rows, torch.cat(expected, dim=1))
        one = region(ctx, row_pair(GRIDS, anchors_per_cell, level=1, images=len(GT)))
        assert torch.equal(one, expected[1])


@pytest.mark.parametrize(
    "expression, message",
    [
        ("GTCells(levels='p3')", 'levels must be "all" or "fpn", got \'p3\''),
        ("Gaussian(levels=1)", 'Gaussian: levels must be "all" or "fpn", got 1'),
        ("ScaledGT(scale='box')", 'scale must be "stride" or "image", got \'box\''),
        ("ScaledBackground(scale='box')", 'scale must be "stride" or "image", got \'box\''),
    ],
)
def test_refused_arguments(expression, message):
    with pytest.raises(ValueError, match=message):
        build_block(KD_REGIONS, expression, "test")
