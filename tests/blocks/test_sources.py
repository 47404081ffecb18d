"""Pairs of levels: by stride, by index, resized; rows of predictions; what is refused."""

import pytest
import torch
from torch.nn import functional as F

from kd_d2.blocks import DenseSource, MapSource
from kd_d2.distillation import KeyInfo, build_tap
from tests.blocks.support import ToyView, observed, toy_ctx
from tests.fixtures import teacher_of, tiny_batch, tiny_model


def _maps(strides, channels, seed, size=128):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, size // s, size // s, generator=generator) for s in strides]


def _neck(strides, channels=4):
    return {"neck": KeyInfo(channels, tuple(strides))}


def _pairs(source, ours=(8, 16, 32), theirs=(4, 8, 16), channels=(4, 6), size=128):
    source.bind(_neck(ours, channels[0]), _neck(theirs, channels[1]))
    student, teacher = (
        _maps(ours, channels[0], 0, size),
        _maps(theirs, channels[1], 1, size),
    )
    views = [
        ToyView({"neck": levels}, strides)
        for levels, strides in ((student, ours), (teacher, theirs))
    ]
    return source(toy_ctx([[], []], [(size, size)] * 2, *views)), student, teacher


def test_levels_of_equal_stride():
    source = MapSource("neck")
    pairs, student, teacher = _pairs(source)
    assert source.indices == ((0, 1), (1, 2)) and source.widths == ((4, 6), (4, 6))
    assert source.strides == (8, 16)
    assert source.student_needs == source.teacher_needs == ("neck",)
    for level, (pair, (i, j)) in enumerate(zip(pairs, source.indices)):
        assert pair.student is student[i] and pair.teacher is teacher[j]
        assert pair.maps and pair.level == level and pair.key == "neck"
        assert [(g.height, g.width, g.stride) for g in pair.grids] == [(16, 16, 8), (8, 8, 16)]
        assert pair.positions == (2, *student[i].shape[-2:]) and pair.num_channels == 6


def test_chosen_levels_count_the_paired_ones():
    source = MapSource("neck", levels=(1,))
    (pair,), student, teacher = _pairs(source)
    assert source.indices == ((1, 2),) and pair.level == 0 and len(pair.grids) == 1
    assert pair.student is student[1] and pair.grids[0].stride == 16


@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_levels_by_index_are_resized_bilinearly(resize):
    # 160 pixels: strides 32 and 64 give 5 and 2 cells, so that no quotient of sizes is a stride
    source = MapSource("neck", pair="index", resize=resize)
    pairs, student, teacher = _pairs(source, (8, 16, 64), (4, 8, 32), size=160)
    assert source.strides == ((4, 8, 32) if resize == "student" else (8, 16, 64))
    for pair, ours, theirs in zip(pairs, student, teacher):
        if resize == "student":
            ours = F.interpolate(ours, size=theirs.shape[-2:], mode="bilinear", align_corners=False)
        else:
            theirs = F.interpolate(
                theirs, size=ours.shape[-2:], mode="bilinear", align_corners=False
            )
        assert torch.equal(pair.student, ours) and torch.equal(pair.teacher, theirs)
    grids = pairs[0].grids
    assert tuple(g.stride for g in grids) == source.strides
    assert [(g.height, g.width) for g in grids] == [tuple(p.student.shape[-2:]) for p in pairs]


def test_resizing_leaves_equal_sizes_alone():
    pairs, student, _ = _pairs(MapSource("neck", resize="student"))
    assert pairs[0].student is student[0]


def test_a_key_of_one_level_is_one_map():
    source = MapSource("neck.p4")
    keys = {"neck.p4": KeyInfo(4, (16,))}
    source.bind(keys, keys)
    value = torch.randn(2, 4, 8, 8)
    view = ToyView({"neck.p4": value})
    (pair,) = source(toy_ctx([[], []], [(128, 128)] * 2, view, view))
    assert pair.student is value and pair.positions == (2, 8, 8)


@pytest.mark.parametrize(
    "source, ours, theirs, message",
    [
        (MapSource("nck"), (8,), (8,), r"'nck', which the student does not have; similar: neck"),
        (MapSource("neck", "nack"), (8,), (8,), r"'nack', which the teacher does not have"),
        (MapSource("neck"), (8, 16), (4,), r"\(8, 16\).*\(4,\).*no level in common.*\"index\""),
        (MapSource("neck", levels=(2,)), (8, 16), (8, 16), r"levels \(2,\).*2 levels are paired"),
        (MapSource("neck", levels=(-1,)), (8, 16), (8, 16), r"levels \(-1,\)"),
        (
            MapSource("neck", pair="index"),
            (8, 16),
            (4, 8),
            r"level 0 of the student's 'neck' has stride 8, its partner in the teacher 4.*resize",
        ),
    ],
)
def test_networks_that_cannot_be_paired(source, ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        source.bind(_neck(ours), _neck(theirs))


def test_maps_of_different_size_without_resizing():
    source = MapSource("neck")
    source.bind(_neck((8,)), _neck((8,)))
    views = [ToyView({"neck": [torch.zeros(1, 4, n, n)]}) for n in (4, 5)]
    with pytest.raises(ValueError, match=r"student \(4, 4\), teacher \(5, 5\); resize one side"):
        source(toy_ctx([[]], None, *views))


SIZES = [(128, 128), (96, 112)]


@pytest.fixture(scope="module", params=["RetinaNet", "GFL", "FCOS", "ATSS"])
def dense(request):
    student = tiny_model(request.param, 0)
    teacher = teacher_of(tiny_model(request.param, 1))
    keys = build_tap(student).keys(student)
    outputs = [o for o in ("cls", "box", "ctr") if f"pred.{o}" in keys]
    needs = [f"pred.{o}" for o in outputs] + ["neck", "anchors", "assign", "codec"]
    ctx = observed(student, tiny_batch(sizes=SIZES), needs, teacher, needs)
    return request.param, student, keys, ctx, outputs


@pytest.mark.parametrize("per_level", [False, True])
def test_rows_of_predictions_are_in_the_order_of_the_anchors(dense, per_level):
    name, _, keys, ctx, outputs = dense
    anchors = ctx.student["anchors"]
    for output in outputs:
        source = DenseSource(output, per_level=per_level)
        source.bind(keys, keys)
        pairs = source(ctx)
        assert len(pairs) == len(source.widths) == (5 if per_level else 1)
        for side, view in (("student", ctx.student), ("teacher", ctx.teacher)):
            rows = torch.cat([getattr(p, side) for p in pairs], dim=1)
            dim = rows.shape[2]
            assert source.widths[0] == (dim, dim)
            assert rows.shape[1] == sum(len(x) for x in anchors)
            start = 0
            for level, boxes in zip(view[f"pred.{output}"], anchors):
                height, width = level.shape[-2:]
                per_cell = len(boxes) // (height * width)
                last = (height - 1, width - 1, per_cell - 1)
                for y, x, a in ((0, 0, 0), (height - 1, 0, per_cell - 1), (0, width - 1, 0), last):
                    row = (y * width + x) * per_cell + a
                    expected = level[:, a * dim : (a + 1) * dim, y, x]
                    assert torch.equal(rows[:, start + row], expected)
                start += len(boxes)


def test_bins_are_rows_of_four_sides(dense):
    name, _, keys, ctx, _ = dense
    source = DenseSource("box", bins=True)
    if name != "GFL":
        with pytest.raises(ValueError, match=r"GFL.*predict 4 numbers per box"):
            source.bind(keys, keys)
        return
    source.bind(keys, keys)
    (pair,) = source(ctx)
    whole = DenseSource("box")
    whole.bind(keys, keys)
    flat = whole(ctx)[0].student
    assert pair.student.shape == (*flat.shape[:2], 4, flat.shape[2] // 4)
    codec = ctx.student["codec"]
    assert torch.equal(pair.student[0], codec.side_logits(flat[0]))
    assert source.widths == ((17, 17),) and pair.positions == flat.shape[:2] + (4,)


def test_two_stage_networks_have_no_dense_rows(dense):
    _, _, keys, _, _ = dense
    model = tiny_model("GeneralizedRCNN")
    with pytest.raises(ValueError, match="'pred.cls', which the teacher does not have.*dense"):
        DenseSource("cls").bind(keys, build_tap(model).keys(model))


def test_classes_must_agree(dense):
    name, _, keys, _, _ = dense
    other = dict(keys)
    other["pred.cls"] = KeyInfo(80, keys["pred.cls"].strides, (80,))
    with pytest.raises(ValueError, match=r"'pred.cls' of student and teacher.*teacher 80"):
        DenseSource("cls").bind(keys, other)
