"""Regions of padding and assignment on real detectors, and those made of others."""

import functools

import pytest
import torch

from kd_d2.blocks import (
    VLR,
    Assigned,
    Complement,
    DenseSource,
    GTCells,
    GTCentre,
    MapSource,
    NearAnchor,
    PairTerm,
    Product,
    TeacherConf,
    Valid,
    anchor_levels,
)
from kd_d2.distillation import KeyInfo, build_tap
from tests.blocks.support import cell_grid, map_pair, observed, row_pair, toy_ctx
from tests.fixtures import teacher_of, tiny_batch, tiny_model

SIZES = [(128, 128), (97, 112), (64, 33)]
NEEDS = ("neck", "anchors", "assign")


def _batch():
    return tiny_batch(3, sizes=SIZES, num_gt=(3, 2, 0))


class _Seen:
    def __init__(self, family):
        self.student = tiny_model(family, 0)
        self.keys = build_tap(self.student).keys(self.student)
        teacher = teacher_of(tiny_model(family, 1))
        scores = "pred.cls" if "pred.cls" in self.keys else "rpn.obj"
        needs = [*NEEDS, scores] + (["codec"] if scores == "pred.cls" else [])
        self.ctx = observed(self.student, _batch(), needs, teacher, needs)

    def bound(self, block):
        block.bind(self.keys, self.keys)
        return block

    def maps(self):
        return self.bound(MapSource("neck"))(self.ctx)


_seen = functools.lru_cache(None)(_Seen)


@pytest.fixture(params=["RetinaNet", "GFL", "GeneralizedRCNN"])
def seen(request):
    return _seen(request.param)


REGIONS = {
    "Valid": Valid,
    "Assigned": Assigned,
    "GTCells": lambda: GTCells("fpn"),
    "GTCentre": GTCentre,
    "NearAnchor": NearAnchor,
    "VLR": VLR,
    "TeacherConf": TeacherConf,
    "Complement": lambda: Complement(NearAnchor()),
    "Product": lambda: Product(Valid(), GTCentre()),
}


@pytest.mark.parametrize("name", REGIONS)
def test_weights_of_real_detectors(seen, name):
    region = seen.bound(REGIONS[name]())
    pairs = seen.maps()
    if region.strides is not None:
        assert {grid.stride for grid in pairs[0].grids} <= set(region.strides)
    total = 0.0
    for pair in pairs:
        weights = region(seen.ctx, pair)
        assert tuple(weights.shape) == pair.positions and weights.dtype == torch.float32
        assert not weights.requires_grad and (weights >= 0).all() and (weights <= 1).all()
        if name in ("Assigned", "GTCells", "GTCentre", "NearAnchor", "VLR", "Product"):
            assert not weights[2].any()  # the image without ground truth
        total += weights.sum()
    assert total > 0


@pytest.mark.parametrize("name", REGIONS)
def test_rows_and_maps_agree(seen, name):
    if "pred.cls" not in seen.keys:
        return  # a two-stage detector has no rows on cells
    region = seen.bound(REGIONS[name]())
    maps = [region(seen.ctx, pair) for pair in seen.maps()]
    (pair,) = seen.bound(DenseSource("cls"))(seen.ctx)
    rows = region(seen.ctx, pair)
    assert rows.shape == pair.positions
    for cells, level in zip(maps, anchor_levels(seen.ctx, rows, pair.grids)):
        by_anchor = level.view(*cells.shape, -1)
        if name in ("Complement", "Product"):
            continue  # per anchor they are something else
        assert torch.equal(by_anchor.amax(dim=-1), cells)
        if name in ("Valid", "GTCells", "NearAnchor", "TeacherConf"):
            assert torch.equal(by_anchor.amin(dim=-1), cells)
    one = [region(seen.ctx, p) for p in seen.bound(DenseSource("cls", per_level=True))(seen.ctx)]
    assert torch.equal(torch.cat(one, dim=1), rows)


def test_valid_cells_by_a_loop(seen):
    region, divisibility = Valid(), seen.student.backbone.size_divisibility
    assert divisibility == 32
    for pair in seen.maps():
        grid = pair.grids[pair.level]
        weights = region(seen.ctx, pair)
        for image, size in enumerate(SIZES):
            padded = [-(-side // 32) * 32 for side in size]
            for y in range(grid.height):
                for x in range(grid.width):
                    inside = y * grid.stride < padded[0] and x * grid.stride < padded[1]
                    assert weights[image, y, x] == inside, (image, y, x)
    assert weights.device == seen.student.device


def test_valid_is_the_padding_that_the_assigner_ignores():
    seen = _seen("GFL")
    for pair in seen.maps():
        ignored = Assigned("ignore")(seen.ctx, pair)
        assert torch.equal(Valid()(seen.ctx, pair) == 0, ignored == 1)


@pytest.mark.parametrize("label", ["pos", "neg", "valid", "ignore"])
def test_assigned_follows_the_labels(seen, label):
    found = seen.ctx.student["assign"]
    labels, background = found.labels, found.num_classes
    expected = {
        "pos": (labels >= 0) & (labels < background),
        "neg": labels == background,
        "valid": labels != -1,
        "ignore": labels == -1,
    }[label]
    region = Assigned(label)
    assert torch.equal(region.anchors(seen.ctx), expected.float())
    start = 0
    by_stride = {}
    strides = seen.ctx.student.tap.anchor_strides(seen.student)
    for boxes, stride in zip(seen.ctx.student["anchors"], strides):
        by_stride[stride] = expected[:, start : start + len(boxes)]
        start += len(boxes)
    for pair in seen.maps():
        grid = pair.grids[pair.level]
        cells = by_stride[grid.stride].view(3, grid.height, grid.width, -1).any(dim=-1)
        assert torch.equal(region(seen.ctx, pair), cells.float())


def test_a_two_stage_student_has_anchors_on_more_levels_than_its_pyramid():
    seen = _seen("GeneralizedRCNN")
    keys, ctx = seen.keys, seen.ctx
    assert keys["neck"].strides == (4, 8, 16, 32) and keys["anchors"].strides[-1] == 64
    pairs = seen.bound(MapSource("neck", levels=(1, 3)))(ctx)
    levels = anchor_levels(ctx, torch.arange(float(_rows(ctx)))[None], pairs[0].grids)
    boxes = ctx.student["anchors"]
    assert [x.shape[1] for x in levels] == [len(boxes[1]), len(boxes[3])]
    assert levels[0][0, 0] == len(boxes[0])
    assert ctx.student["assign"].num_classes == 1


def _rows(ctx):
    return sum(len(boxes) for boxes in ctx.student["anchors"])


# ------------------------------------------------------------------ made of others, on toy grids
GRID = (cell_grid(8, 4),)


def test_complement_and_product():
    ctx = toy_ctx([[[0.0, 0, 16, 16]], []])
    pair = map_pair(GRID, images=2)
    cells = GTCells()(ctx, pair)
    assert torch.equal(Complement(GTCells())(ctx, pair), 1 - cells)
    other = GTCells()(toy_ctx([[[8.0, 8, 32, 32]], []]), pair)
    assert not torch.equal(cells, other)

    class Other(GTCells):
        def cells(self, ctx, grids):
            return [0.5 * other]

    found = Product(GTCells(), Other())(ctx, pair)
    assert torch.equal(found, cells * 0.5 * other) and found.sum() == 0.5
    assert torch.equal(Complement(Other())(ctx, pair), (other == 0).float())


def test_parts_are_bound_and_their_needs_and_strides_joined():
    keys = {
        "anchors": KeyInfo(None, (8, 16)),
        "assign": KeyInfo(None, (8, 16)),
        "pred.cls": KeyInfo(3, (4, 8), (3,)),
    }
    region = Complement(Product(Assigned(), TeacherConf(), GTCells()))
    region.bind(keys, keys)
    assert region.student_needs == ("anchors", "assign")
    assert region.teacher_needs == ("pred.cls",)
    assert region.strides == (8,)
    free = Product(GTCells(), Valid())
    free.bind(keys, keys)
    assert free.strides is None and free.student_needs == ()


def test_weights_are_computed_once_a_step_and_anew_in_the_next():
    calls = []

    class Counted(GTCells):
        def cells(self, ctx, grids):
            calls.append(grids)
            return super().cells(ctx, grids)

    grids = (cell_grid(8, 4), cell_grid(16, 2))
    region, ctx = Counted(), toy_ctx([[[0.0, 0, 16, 16]]])
    for level in (0, 1):
        region(ctx, map_pair(grids, level))
    region(ctx, row_pair(grids, 2))
    assert calls == [grids]
    region(ctx, map_pair(GRID))  # other levels
    assert calls == [grids, GRID]
    moved = toy_ctx([[[16.0, 16, 32, 32]]])
    assert not torch.equal(region(moved, map_pair(GRID)), region(ctx, map_pair(GRID)))
    assert len(calls) == 3
    # two regions of one type do not share
    assert GTCells("fpn")(ctx, map_pair(grids, 1)).sum() == 0
    assert GTCells("all")(ctx, map_pair(grids, 1)).sum() == 1


@pytest.mark.parametrize("region", [Valid(), GTCentre(), GTCells(), Complement(GTCells())])
def test_values_without_cells_are_named(region):
    pair = map_pair(GRID)
    pair.grids = ()
    with pytest.raises(
        ValueError, match="(Valid|GTCentre|GTCells) weights cells.*'neck' lie on no"
    ):
        region(toy_ctx([[]]), pair)


@pytest.mark.parametrize("region", [Assigned(), NearAnchor(), VLR(), GTCentre()])
def test_regions_of_anchors_are_checked_when_the_networks_are_bound(region):
    keys = {"neck": KeyInfo(4, (4, 8, 16)), "anchors": KeyInfo(None, (8, 16, 32))}
    term = PairTerm(MapSource("neck"), region=region)
    message = rf"{type(region).__name__} is defined at strides \(8, 16, 32\).*\(4, 8, 16\).*\[4\]"
    with pytest.raises(ValueError, match=message):
        term.bind(keys, keys)
    PairTerm(MapSource("neck", levels=(1, 2)), region=region).bind(keys, keys)
    with pytest.raises(ValueError, match="needs 'anchors' of the student"):
        term.bind({"neck": keys["neck"]}, keys)
