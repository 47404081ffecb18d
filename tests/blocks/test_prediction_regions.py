"""Regions that predictions determine: worked-out numbers, loops, choice of the keys."""

import pytest
import torch
from detectron2.structures import Boxes

from kd_d2.blocks import (
    BCE,
    All,
    Const,
    GISelect,
    PairTerm,
    PredDiff,
    SquaredL2,
    TeacherConf,
    Weights,
)
from kd_d2.blocks.pair import Pair
from kd_d2.blocks.sources import Source
from kd_d2.distillation import KeyInfo
from tests.blocks.support import (
    ToyCodec,
    ToyView,
    cell_grid,
    map_pair,
    row_pair,
    square_anchors,
    toy_ctx,
)

# the two cells of the worked-out case, two classes each
P_T = torch.tensor([[0.8, 0.2], [0.1, 0.1]])
P_S = torch.tensor([[0.4, 0.2], [0.1, 0.1]])
GRID = (cell_grid(8, 1, 2),)
GRIDS = (cell_grid(8, 4, 6), cell_grid(16, 2, 3))
K = 3


def _as_map(probabilities):
    """(cells, K) -> logits (1, K, 1, cells)."""
    return probabilities.logit().t()[None, :, None, :].contiguous()


def _keys(strides=(8,), classes=2, anchors=1):
    return {
        "pred.cls": KeyInfo(anchors * classes, strides, (classes,)),
        "pred.box": KeyInfo(anchors * 4, strides),
        "anchors": KeyInfo(None, strides, ("cells",)),
    }


def _bound(region, student=None, teacher=None):
    region.bind(student or _keys(), teacher or _keys())
    return region


def _toy(student_cls=P_S, teacher_cls=P_T):
    views = [ToyView({"pred.cls": [_as_map(p)]}) for p in (student_cls, teacher_cls)]
    return toy_ctx([[]], [(8, 16)], *views)


class _Given(Source):
    """The same pair in every step."""

    def __init__(self, student, teacher, maps=True):
        self._values, self.widths = (student, teacher, maps), ((2, 2),)

    def __call__(self, ctx):
        student, teacher, maps = self._values
        return [Pair(student.clone(), teacher.clone(), maps, GRID, 0 if maps else None, "neck")]


FEATURES = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 5]], [[1, 5]]]])


def test_teacher_confidence_worked_out():
    region = _bound(TeacherConf())
    assert region(_toy(), map_pair(GRID)).tolist() == [[pytest.approx([0.8, 0.1])]]
    assert region.teacher_needs == ("pred.cls",) and region.student_needs == ()
    feat = PairTerm(_Given(*FEATURES), region=region, normaliser=Weights())
    assert feat(_toy()).item() == pytest.approx(7.333333, abs=1e-5)  # (.8 * 2 + .1 * 50) / .9
    rows = [_as_map(p).flatten(2).transpose(1, 2) for p in (P_S, P_T)]
    cls = PairTerm(_Given(*rows, False), region=region, distance=BCE(), normaliser=Weights())
    assert cls(_toy()).item() == pytest.approx(1.259441, abs=1e-5)


def test_prediction_difference_worked_out():
    region = _bound(PredDiff())
    found = region(_toy(), map_pair(GRID))
    torch.testing.assert_close(found, torch.tensor([[[0.08, 0.0]]]), atol=1e-7, rtol=0)
    # mean over the channels of the squared difference, and over the positions: (1, 25) -> .04
    term = PairTerm(
        _Given(*FEATURES), region=region, distance=SquaredL2(0.5), normaliser=Const(2.0)
    )
    assert term(_toy()).item() == pytest.approx(0.04, abs=1e-7)
    assert not _bound(PredDiff())(_toy(P_T, P_T), map_pair(GRID)).any()


def _random_cls(anchors, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, anchors * K, g.height, g.width, generator=generator).to(dtype) for g in GRIDS
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("anchors", [1, 2])
def test_maps_of_probabilities_equal_a_loop(anchors, dtype):
    ours, theirs = _random_cls(anchors, 0, dtype), _random_cls(anchors, 1, dtype)
    ours = [x.requires_grad_() for x in ours]
    views = [ToyView({"pred.cls": x}, (8, 16)) for x in (ours, theirs)]
    keys = _keys((8, 16), K, anchors)
    confidence, difference = _bound(TeacherConf(), keys, keys), _bound(PredDiff(), keys, keys)
    ctx = toy_ctx([[], []], [(32, 48)] * 2, *views)
    rows = confidence(ctx, row_pair(GRIDS, anchors, images=2))
    start = 0
    for level, grid in enumerate(GRIDS):
        conf, diff = (r(ctx, map_pair(GRIDS, level, 2)) for r in (confidence, difference))
        assert conf.dtype == diff.dtype == torch.float32 and not diff.requires_grad
        for image in range(2):
            for y in range(grid.height):
                for x in range(grid.width):
                    s, t = (
                        [1 / (1 + 2.718281828459045**-v) for v in p[level][image, :, y, x].tolist()]
                        for p in (ours, theirs)
                    )
                    assert conf[image, y, x].item() == pytest.approx(max(t), abs=1e-6)
                    mean = sum((a - b) ** 2 for a, b in zip(s, t)) / len(s)
                    assert diff[image, y, x].item() == pytest.approx(mean, abs=1e-6)
                    for anchor in range(anchors):
                        row = start + (y * grid.width + x) * anchors + anchor
                        assert rows[image, row] == conf[image, y, x]
        start += grid.height * grid.width * anchors


def test_two_stage_teachers_give_their_objectness():
    region = TeacherConf()
    region.bind(_keys(), {"rpn.obj": KeyInfo(3, (4, 8), ())})
    assert region.teacher_needs == ("rpn.obj",)
    teacher = ToyView({"rpn.obj": [torch.zeros(1, 3, 2, 4), _as_map(P_T)]})
    found = region(toy_ctx([[]], [(8, 16)], None, teacher), map_pair(GRID))
    assert found.tolist() == [[pytest.approx([0.8, 0.1])]]


def test_two_stage_pairs_differ_in_their_objectness():
    keys = {"rpn.obj": KeyInfo(2, (8,)), "anchors": KeyInfo(None, (8,), ("cells",))}
    region = _bound(PredDiff(), keys, keys)
    assert region.student_needs == region.teacher_needs == ("rpn.obj",)
    views = [ToyView({"rpn.obj": [_as_map(p)]}) for p in (P_S, P_T)]
    found = region(toy_ctx([[]], [(8, 16)], *views), map_pair(GRID))
    assert found.flatten().tolist() == pytest.approx([0.08, 0.0], abs=1e-7)


def test_networks_that_do_not_fit_are_refused_at_build_time():
    with pytest.raises(ValueError, match="'pred.cls' or 'rpn.obj' of the teacher"):
        TeacherConf().bind(_keys(), {"neck": KeyInfo(8, (8,))})
    two_stage = {"rpn.obj": KeyInfo(3, (8,)), "anchors": KeyInfo(None, (8,), ("cells",))}
    with pytest.raises(ValueError, match="both must be one-stage or both two-stage"):
        PredDiff().bind(_keys(), two_stage)
    with pytest.raises(ValueError, match=r"'pred.cls'.*student 2, teacher 3"):
        PredDiff().bind(_keys(), _keys(classes=3))
    with pytest.raises(ValueError, match="GISelect compares 'pred.cls', which the teacher"):
        GISelect().bind(_keys(), two_stage)
    with pytest.raises(ValueError, match="GISelect compares 'anchors'.*signature differ"):
        GISelect().bind(_keys(), {**_keys(), "anchors": KeyInfo(None, (8,), ("other",))})


def test_maps_of_another_size_or_stride_are_named():
    region = _bound(TeacherConf())
    with pytest.raises(ValueError, match=r"'pred.cls' of the teacher.*\(8,\), none at \(16,\)"):
        region(_toy(), map_pair((cell_grid(16, 1, 2),)))
    region = _bound(TeacherConf())
    with pytest.raises(ValueError, match=r"\(1, 2\) cells at stride 8.*\(2, 2\)"):
        region(_toy(), map_pair((cell_grid(8, 2, 2),)))


# ------------------------------------------------------------------------- general instances
def _gi_views(anchors, boxes_seed=5, spread=6.0):
    sizes = tuple(1.0 + a for a in range(anchors))
    boxes = [square_anchors(g, sizes) for g in GRIDS]
    generator = torch.Generator().manual_seed(boxes_seed)
    views = []
    for seed in (0, 1):
        raw = [
            spread * torch.randn(2, anchors * 4, g.height, g.width, generator=generator)
            for g in GRIDS
        ]
        raw = [_ordered(x, anchors) for x in raw]
        values = {"pred.cls": _random_cls(anchors, seed), "pred.box": raw}
        values.update(anchors=boxes, codec=ToyCodec())
        views.append(ToyView(values, (8, 16)))
    return views


def _ordered(raw, anchors):
    """Raw boxes whose first corner moves to the upper left and second to the lower right."""
    shape = raw.shape
    raw = raw.view(shape[0], anchors, 4, *shape[2:]).abs()
    raw = torch.cat([-raw[:, :, :2], raw[:, :, 2:]], dim=2)
    return raw.view(shape)


def _iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(r[2] - r[0]) * (r[3] - r[1]) for r in (a, b)]
    return width * height / (sum(areas) - width * height)


def _naive_instances(views, anchors, image, num, iou, scope, candidates):
    """[(score, box, index of the anchor)], one anchor after another, best first."""
    found, index = [], 0
    for level, grid in enumerate(GRIDS):
        for y in range(grid.height):
            for x in range(grid.width):
                for a in range(anchors):
                    p = [
                        v["pred.cls"][level][image, a * K : (a + 1) * K, y, x].sigmoid()
                        for v in views
                    ]
                    gaps = (p[1] - p[0]).abs()
                    best = int(gaps.argmax())
                    winner = views[1] if p[1][best] > p[0][best] else views[0]
                    anchor = views[0]["anchors"][level].tensor[(y * grid.width + x) * anchors + a]
                    raw = winner["pred.box"][level][image, a * 4 : (a + 1) * 4, y, x]
                    box = (anchor + raw).tolist()
                    found.append((gaps[best].item(), box, index, level if scope == "level" else 0))
                    index += 1
    result = []
    for group in sorted({f[3] for f in found}):
        kept = []
        for f in sorted((f for f in found if f[3] == group), reverse=True)[:candidates]:
            if all(_iou(f[1], k[1]) <= iou for k in kept):
                kept.append(f)
        result += kept[:num]
    return sorted(result, reverse=True)


@pytest.mark.parametrize("scope, num", [("level", 3), ("image", 4), ("level", 100)])
@pytest.mark.parametrize("anchors", [1, 2])
def test_instances_equal_a_loop(anchors, scope, num):
    views = _gi_views(anchors)
    keys = _keys((8, 16), K, anchors)
    candidates = 100 if num == 100 else 20
    region = _bound(GISelect(num, scope=scope, candidates=candidates), keys, keys)
    ctx = toy_ctx([[], []], [(32, 48)] * 2, *views)
    found = region.instances(ctx)
    suppressed = False
    for image in range(2):
        expected = _naive_instances(views, anchors, image, num, 0.3, scope, candidates)
        assert found[image].anchor.tolist() == [index for _, _, index, _ in expected]
        torch.testing.assert_close(found[image].scores, torch.tensor([e[0] for e in expected]))
        torch.testing.assert_close(
            found[image].boxes.tensor, torch.tensor([e[1] for e in expected])
        )
        suppressed |= num == 100 and len(expected) < 30 * anchors
    assert suppressed or num != 100


def test_instances_as_a_region_of_rows_and_of_cells():
    anchors = 2
    views, keys = _gi_views(anchors), _keys((8, 16), K, 2)
    region = _bound(GISelect(3), keys, keys)
    ctx = toy_ctx([[], []], [(32, 48)] * 2, *views)
    rows = region(ctx, row_pair(GRIDS, anchors, images=2))
    for image, found in enumerate(region.instances(ctx)):
        assert sorted(found.anchor.tolist()) == rows[image].nonzero().flatten().tolist()
        assert len(found) == 6 and set(rows[image].tolist()) == {0.0, 1.0}
    start = 0
    for level, grid in enumerate(GRIDS):
        cells = region(ctx, map_pair(GRIDS, level, 2))
        stop = start + grid.height * grid.width * anchors
        by_cell = rows[:, start:stop].view(2, grid.height, grid.width, anchors)
        assert torch.equal(cells, by_cell.amax(dim=-1))
        start = stop
    # the networks are read once a step, whatever asks
    assert views[1].reads.count("pred.box") == 1


def test_instances_worked_out():
    boxes = [[0.0, 0, 8, 8], [100, 100, 108, 108]]
    views = [
        ToyView(
            {
                "pred.cls": [_as_map(p)],
                "pred.box": [torch.full((1, 4, 1, 2), moved)],
                "anchors": [Boxes(torch.tensor(boxes))],
                "codec": ToyCodec(),
            }
        )
        for p, moved in ((P_S, 1.0), (P_T, 2.0))
    ]
    region = _bound(GISelect(10))
    (found,) = region.instances(toy_ctx([[]], [(8, 16)], *views))
    assert found.scores.tolist() == pytest.approx([0.4, 0.0], abs=1e-7)
    assert found.boxes.tensor[0].tolist() == [2.0, 2, 10, 10]  # the teacher's, which is surer
    swapped = toy_ctx([[]], [(8, 16)], views[1], views[0])
    (found,) = _bound(GISelect(1)).instances(swapped)
    assert len(found) == 1 and found.boxes.tensor[0].tolist() == [2.0, 2, 10, 10]


def test_levels_do_not_suppress_each_other_beyond_the_image():
    # both boxes reach far beyond the upper left corner; groups must stay apart nevertheless
    probabilities = torch.tensor([[0.9, 0.1]])
    views = []
    for p in (probabilities * 0 + 0.1, probabilities):
        views.append(
            ToyView(
                {
                    "pred.cls": [_as_map(p), _as_map(p)],
                    "pred.box": [torch.zeros(1, 4, 1, 1)] * 2,
                    "anchors": [
                        Boxes(torch.tensor([[-50.0, -50, 10, 10]])),
                        Boxes(torch.tensor([[-61.0, -61, -1, -1]])),
                    ],
                    "codec": ToyCodec(),
                },
                (8, 16),
            )
        )
    keys = _keys((8, 16), 2)
    ctx = toy_ctx([[]], [(16, 16)], *views)
    assert len(_bound(GISelect(5, scope="level"), keys, keys).instances(ctx)[0]) == 2
    assert len(_bound(GISelect(5, scope="image"), keys, keys).instances(ctx)[0]) == 1


def test_half_precision_predictions_select_without_error():
    views, keys = _gi_views(1), _keys((8, 16), K)
    halves = [
        ToyView({k: [x.half() for x in v] if "pred" in k else v for k, v in view._values.items()})
        for view in views
    ]
    for view in halves:
        view.tap = views[0].tap
    region = _bound(GISelect(2), keys, keys)
    weights = region(toy_ctx([[], []], [(32, 48)] * 2, *halves), row_pair(GRIDS, 1, images=2))
    assert weights.dtype == torch.float32 and weights.sum() == 8


@pytest.mark.parametrize(
    "arguments", [{"num": 0}, {"iou": 1.5}, {"num": 10, "candidates": 5}, {"scope": "batch"}]
)
def test_instances_refuse(arguments):
    with pytest.raises(ValueError, match="GISelect: "):
        GISelect(**arguments)


def test_all_is_one_everywhere():
    assert torch.equal(All()(None, map_pair(GRIDS, 1, 2)), torch.ones(2, 2, 3))
    assert torch.equal(All()(None, row_pair(GRIDS, 3, images=2)), torch.ones(2, 90))
