"""Masks of Table 6: worked-out cells, a loop over boxes and cells, and the loss."""

import math

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from kd_d2.blocks import Grid
from kd_d2.distillation import KeyInfo, build_tap
from kd_d2.projects.gdetkd.feature_masks import CentreCells, CentreGaussian, GTMaskTerm, WholeTerm
from kd_d2.projects.gdetkd.feature_terms import FEATURE_TERMS, build_feature_term
from tests.blocks.support import ToyView, map_pair, observed, toy_ctx
from tests.fixtures import teacher_of, tiny_batch, tiny_cfg, tiny_model

MASKS = ("whole", "anchor_mask", "gaussian_mask", "gt_mask")
# P3-P6 of a batch padded to 192x320
GRIDS = tuple(Grid(192 // s, 320 // s, s) for s in (8, 16, 32, 64))
SIZES = [(192, 320), (100, 150), (192, 320)]
GT = [
    [[3.5, 7.0, 100.25, 61.0], [20.0, 20.0, 24.0, 90.0], [61.0, 30.0, 187.0, 125.0]]
    + [[150.0, 50.0, 150.0, 60.0]],
    [],
    # at centres of cells, without a centre, wholly outside, large, and over the border
    [[12.0, 4.0, 20.0, 36.0], [33.0, 41.0, 35.0, 43.0], [330.0, 10.0, 370.0, 30.0]]
    + [[0.0, 0.0, 320.0, 192.0], [-30.0, 100.0, 22.0, 200.0]],
]


def naive(box, grid, bell):
    """Weights of one box, cell by cell."""
    x1, y1, x2, y2 = box
    centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
    weights = torch.zeros(grid.height, grid.width, dtype=torch.float64)
    for row in range(grid.height):
        for column in range(grid.width):
            x, y = (column + 0.5) * grid.stride, (row + 0.5) * grid.stride
            if x1 <= x < x2 and y1 <= y < y2:
                dx, dy = (x - centre_x) / ((x2 - x1) / 2), (y - centre_y) / ((y2 - y1) / 2)
                weights[row, column] = math.exp(-0.5 * dx * dx - 0.5 * dy * dy) if bell else 1.0
    if not weights.any():
        row = min(max(math.floor(centre_y / grid.stride), 0), grid.height - 1)
        column = min(max(math.floor(centre_x / grid.stride), 0), grid.width - 1)
        weights[row, column] = 1.0
    return weights


def naive_level(box, strides):
    """Stride of the only level of a box: 4 below 112 pixels, then twice as much an octave."""
    # DeFeat's code takes the last pixel as part of the box
    side = math.sqrt((box[2] - box[0] + 1) * (box[3] - box[1] + 1))
    level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 4)
    return min(max(4 * 2**level, min(strides)), max(strides))


@pytest.mark.parametrize("levels", ["all", "fpn"])
@pytest.mark.parametrize("bell", [False, True])
def test_masks_against_a_loop(bell, levels):
    region = (CentreGaussian if bell else CentreCells)(levels)
    ctx = toy_ctx(GT, SIZES)
    used = set()
    for index, grid in enumerate(GRIDS):
        found = region(ctx, map_pair(GRIDS, index, images=3))
        for image, boxes in enumerate(GT):
            expected = torch.zeros(grid.height, grid.width, dtype=torch.float64)
            for box in boxes:
                if levels == "all" or naive_level(box, [8, 16, 32, 64]) == grid.stride:
                    used.add(index)
                    expected = torch.maximum(expected, naive(box, grid, bell))
            torch.testing.assert_close(found[image].double(), expected, atol=1e-6, rtol=1e-6)
    assert len(used) == (4 if levels == "all" else 2)


def test_worked_out_cells():
    grid = (Grid(4, 6, 4),)
    ctx = toy_ctx([[[4.0, 4.0, 20.0, 12.0]]], [(16, 24)])
    cells = CentreCells()(ctx, map_pair(grid))[0]
    assert cells.nonzero().tolist() == [[y, x] for y in (1, 2) for x in (1, 2, 3, 4)]
    bell = CentreGaussian()(ctx, map_pair(grid))[0]
    row = torch.tensor([0, 0.6661, 0.8553, 0.8553, 0.6661, 0])
    torch.testing.assert_close(bell[1:3], row.expand(2, 6), atol=5e-5, rtol=0)
    assert bell[[0, 3]].sum() == 0
    # the middle, the middle of an edge, a corner
    profile = CentreGaussian().profile(torch.tensor([0.0, 1.0]))
    assert profile.tolist() == pytest.approx([1, 0.6065], abs=5e-5)
    assert profile[1] ** 2 == pytest.approx(0.3679, abs=5e-5)


def test_level_of_a_box_on_the_whole_pyramid():
    grids = tuple(Grid(32 // 2**i, 32 // 2**i, 4 * 2**i) for i in range(5))
    sides = {100: 4, 111: 8, 222: 8, 223: 16, 447: 32, 895: 64, 1333: 64}
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in sides])
    for offset, compared in ((0, grids), (1, grids[1:])):
        own = CentreCells("fpn").own_level(boxes, compared)
        strides = [compared[i].stride for i in own.tolist()]
        assert strides == [max(s, compared[0].stride) for s in sides.values()], offset


ANCHORS = [
    [8.0 * x - 8, 8.0 * y - h / 2, 8.0 * x + 8, 8.0 * y + h / 2]
    for y in range(4)
    for x in range(4)
    for h in (16, 32)
]


def keys(strides, family="two_stage", channels=2):
    result = {f"neck.p{i}": KeyInfo(channels, (s,)) for i, s in enumerate(strides, 2)}
    result["neck"] = KeyInfo(channels, tuple(strides))
    result["anchors"] = KeyInfo(None, tuple(strides))
    result["proposals" if family == "two_stage" else "pred.cls"] = KeyInfo()
    return result


def build(mode, strides, family="two_stage", channels=2, teacher_strides=None, **node):
    cfg = tiny_cfg("GeneralizedRCNN", **{f"KD.GDETKD.FEAT.{k}": v for k, v in node.items()})
    cfg.KD.GDETKD.FEAT.MODE = mode
    teacher = keys(teacher_strides or strides, channels=channels)
    return build_feature_term(cfg, keys(strides, family, channels), teacher)


def run(term, ctx):
    with EventStorage() as storage:
        loss = term(ctx, None)
        return loss, storage.latest()[f"gdetkd/{term.name}_cells"][0]


def identity(term):
    """f_adapt passes the maps on."""
    for conv in term.compared.adapter.layers:
        torch.nn.init.dirac_(conv.weight)
        torch.nn.init.zeros_(conv.bias)


def test_worked_out_anchor_mask():
    term = build("anchor_mask", (8,))
    student = ToyView(
        {"neck.p2": torch.zeros(1, 2, 4, 4), "anchors": [Boxes(torch.tensor(ANCHORS))]}
    )
    ctx = toy_ctx([[[4.0, 4.0, 20.0, 20.0]]], student=student)
    mask = term.region(ctx, map_pair((Grid(4, 4, 8),)))[0]
    assert torch.equal(mask, torch.tensor([0.0, 1, 1, 0]).expand(4, 4))


def test_anchor_mask_against_a_loop():
    """The largest IoU counts per level; a box without any overlap marks nothing."""
    seed_all_rng(1)
    strides, sizes = (8, 16), (8, 4)
    anchors = []
    for stride, size in zip(strides, sizes):
        centres = torch.cartesian_prod(torch.arange(size), torch.arange(size)).flip(1) * stride
        centres = centres.repeat_interleave(2, dim=0).float()
        half = torch.tensor([[1.0, 1.0], [1.5, 0.75]]).repeat(size * size, 1) * stride
        anchors.append(torch.cat([centres - half, centres + half], dim=1))
    gt = [[[5.0, 9.0, 30.0, 25.0], [40.0, 2.0, 63.0, 60.0]], [[200.0, 200.0, 220.0, 210.0]]]
    for assign in ("all", "fpn"):
        term = build("anchor_mask", strides, LEVEL_ASSIGN=assign)
        view = ToyView({"anchors": [Boxes(a) for a in anchors]}, strides=strides)
        ctx = toy_ctx(gt, [(64, 64)] * 2, student=view)
        grids = tuple(Grid(n, n, s) for n, s in zip(sizes, strides))
        marked = 0
        for level, (size, level_anchors) in enumerate(zip(sizes, anchors)):
            found = term.region(ctx, map_pair(grids, level, images=2))
            for image, boxes in enumerate(gt):
                expected = torch.zeros(size * size)
                for box in boxes:
                    overlaps = [iou(box, a) for a in level_anchors.tolist()]
                    # both boxes are smaller than 112 pixels, hence on the finest level
                    if assign == "fpn" and level > 0:
                        continue
                    for number, overlap in enumerate(overlaps):
                        if overlap > 0.5 * max(overlaps):
                            expected[number // 2] = 1
                marked += int(expected.sum())
                assert torch.equal(found[image].flatten(), expected), (assign, level, image)
        assert marked > 4 and found[1].sum() == 0


def iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


class Given(CentreCells):
    """A mask that the test gives, one map a level."""

    def __init__(self, masks):
        super().__init__()
        self.masks = masks

    def cells(self, ctx, grids):
        return self.masks


@pytest.mark.parametrize("mask, expected", [((1, 1, 0), 1.5), ((1, 0.5, 0), 0.875), ((0, 0, 0), 0)])
def test_worked_out_loss(mask, expected):
    term = build("gt_mask", (8,))
    identity(term)
    term.region = term.compared.region = Given([torch.tensor([[mask]]).float()])
    teacher = torch.tensor([[1.0, 2.0, 5.0], [0.0, 1.0, 5.0]])[None, :, None]
    student = torch.zeros(1, 2, 1, 3, requires_grad=True)
    view = ToyView({"neck.p2": student})
    ctx = toy_ctx([[]], student=view, teacher=ToyView({"neck.p2": teacher}))
    loss, cells = run(term, ctx)
    assert loss.item() == pytest.approx(expected)
    assert cells == sum(m > 0 for m in mask)
    loss.backward()
    assert (student.grad.abs().sum() > 0) == (expected > 0)
    assert term.compared.adapter.layers[0].weight.grad is not None


def test_one_divisor_for_all_images_and_levels():
    term = build("whole", (8, 16))
    identity(term)
    shapes = ((2, 2, 4, 4), (2, 2, 2, 2))
    seed_all_rng(0)
    ours, theirs = ([torch.randn(*shape) for shape in shapes] for _ in range(2))
    views = [ToyView({f"neck.p{i}": x for i, x in enumerate(maps, 2)}) for maps in (ours, theirs)]
    loss, cells = run(term, toy_ctx([[], []], student=views[0], teacher=views[1]))
    assert cells == 2 * (16 + 4)
    total = sum((s - t).square().sum().item() for s, t in zip(ours, theirs))
    assert loss.item() == pytest.approx(total / (2 * 40), rel=1e-5)


def test_registered_with_the_weight_of_fgfi():
    for mode in MASKS:
        assert FEATURE_TERMS.get(mode).default_weight == 0.01
        assert build(mode, (8, 16)).name == mode


def test_adapter_is_one_convolution_a_level():
    plain, relu = build("whole", (8, 16), channels=3), build("whole", (8, 16), ADAPT_RELU=True)
    assert [tuple(c.weight.shape) for c in plain.compared.adapter.layers] == [(3, 3, 3, 3)] * 2
    assert all(c.weight.std() > 0.05 for c in plain.compared.adapter.layers)
    for layer in relu.compared.adapter.layers:
        assert isinstance(layer[1], torch.nn.ReLU)
        assert 0 < layer[0].weight.abs().max() <= 2e-4 and not layer[0].bias.any()


def test_levels_by_stride():
    """P3-P7 of a dense student and P2-P6 of the teacher share P3-P6."""
    cfg = tiny_cfg("RetinaNet", **{"KD.GDETKD.FEAT.MODE": "gt_mask"})
    student, teacher = tiny_model("RetinaNet"), teacher_of(tiny_cfg("GeneralizedRCNN"))
    term = build_feature_term(cfg, build_tap(student).keys(student), teacher.keys)
    shared = tuple(f"neck.p{i}" for i in (3, 4, 5, 6))
    assert set(term.student_needs) == set(term.teacher_needs) == set(shared)
    # sizes of both pyramids also agree where the padded size is no multiple of 64
    for sizes in ([(128, 128)], [(96, 160)]):
        batch = tiny_batch(1, sizes, num_gt=2)
        ctx = observed(student, batch, term.student_needs, teacher, term.teacher_needs)
        loss, cells = run(term, ctx)
        assert loss > 0 and cells >= 4
        mine = ctx.student["neck.p6"], ctx.teacher["neck.p6"]
        assert mine[0].shape[-2:] == mine[1].shape[-2:]


@pytest.mark.parametrize("mode", MASKS)
def test_two_stage_pair(mode):
    cfg = tiny_cfg("GeneralizedRCNN", **{"KD.GDETKD.FEAT.MODE": mode})
    student, teacher = tiny_model("GeneralizedRCNN"), teacher_of(tiny_cfg("Cascade"))
    term = build_feature_term(cfg, build_tap(student).keys(student), teacher.keys)
    assert {k for k in term.student_needs if k.startswith("neck.")} == {
        f"neck.p{i}" for i in range(2, 7)
    }
    ctx = observed(student, tiny_batch(), term.student_needs, teacher, term.teacher_needs)
    loss, cells = run(term, ctx)
    loss.backward()
    assert loss > 0 and cells > 0
    assert all(p.grad.abs().sum() > 0 for p in term.parameters())
    assert student.backbone.bottom_up.res2[0].conv1.weight.grad.abs().sum() > 0
    # without ground truth a mask that it draws is empty: a zero that is connected to everything
    ctx = observed(student, tiny_batch(num_gt=0), term.student_needs, teacher, term.teacher_needs)
    loss, cells = run(term, ctx)
    loss.backward()
    assert (cells == 0) == (mode != "whole") and (loss.item() == 0) == (mode != "whole")


def test_what_cannot_be_compared():
    for mode in MASKS[:3]:
        with pytest.raises(ValueError, match=f"'{mode}' is for two-stage students"):
            build(mode, (8, 16), family="dense")
    assert isinstance(build("gt_mask", (8, 16), family="dense"), GTMaskTerm)
    with pytest.raises(ValueError, match="no level in common"):
        build("gt_mask", (8, 16), teacher_strides=(4,))
    with pytest.raises(ValueError, match="LEVEL_ASSIGN must be one of"):
        WholeTerm(student_keys=keys((8,)), teacher_keys=keys((8,)), level_assign="some")
    term = build("whole", (8,))
    views = [ToyView({"neck.p2": torch.zeros(1, 2, size, 4)}) for size in (4, 5)]
    with pytest.raises(ValueError, match="maps of 'neck' differ in size"):
        run(term, toy_ctx([[]], student=views[0], teacher=views[1]))
