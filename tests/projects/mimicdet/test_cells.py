"""Numbers of cells."""

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes

from kd_d2.projects.mimicdet.cells import (
    cell_levels,
    cell_positions,
    gather_cells,
    grid_sizes,
    level_offsets,
)

from .refinement_cases import SIDES, STRIDES

GRIDS = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]


def test_offsets():
    assert level_offsets(GRIDS) == [0, 16800, 21000, 22050, 22323, 22400]


@pytest.mark.parametrize(
    "index, position",
    [
        (0, (0, 0, 0)),
        (167, (0, 0, 167)),
        (168, (0, 1, 0)),
        (16799, (0, 99, 167)),
        (16800, (1, 0, 0)),
        (21517, (2, 12, 13)),
        (22322, (3, 12, 20)),
        (22323, (4, 0, 0)),
        (22399, (4, 6, 10)),
    ],
)
def test_positions(index, position):
    found = cell_positions(torch.tensor([index]), GRIDS)
    assert tuple(int(x) for x in found) == position


def test_every_cell_has_its_number():
    index = torch.arange(22400)
    level, y, x = cell_positions(index, GRIDS)
    offsets, widths = torch.tensor(level_offsets(GRIDS)), torch.tensor([w for _, w in GRIDS])
    assert torch.equal(offsets[level] + y * widths[level] + x, index)
    assert torch.equal(cell_levels(index, GRIDS), level)


def test_numbers_are_those_of_the_anchors():
    generator = DefaultAnchorGenerator(
        sizes=[[x] for x in SIDES], aspect_ratios=[[1.0]], strides=STRIDES, offset=0.5
    )
    anchors = Boxes.cat(generator([torch.zeros(1, 1, *grid) for grid in GRIDS]))
    assert anchors.tensor[21517].tolist() == [368, 336, 496, 464]


def test_gathered_vectors_and_their_gradient():
    grids = [(4, 6), (2, 3), (1, 2)]
    torch.manual_seed(0)
    maps = [torch.randn(2, 5, *grid, dtype=torch.double, requires_grad=True) for grid in grids]
    assert grid_sizes(maps) == grids
    index = [torch.tensor([0, 31, 23, 24, 7]), torch.tensor([29, 30])]
    rows = gather_cells(maps, index)
    expected = []
    for image, numbers in enumerate(index):
        for level, y, x in zip(*(v.tolist() for v in cell_positions(numbers, grids))):
            expected.append(maps[level][image, :, y, x])
    assert torch.equal(rows, torch.stack(expected))
    rows.sum().backward()
    assert sum(int((x.grad != 0).sum()) for x in maps) == 7 * 5
    assert maps[2].grad[0, :, 0, 1].eq(1).all() and maps[2].grad[1, :, 0, 1].eq(0).all()


def test_no_cells():
    maps = [torch.randn(2, 5, 4, 4, requires_grad=True)]
    none = torch.zeros(0, dtype=torch.int64)
    rows = gather_cells(maps, [none, none])
    assert rows.shape == (0, 5)
    rows.sum().backward()
    assert maps[0].grad.eq(0).all()
