"""Terms of blocks against naive sums; precision, gradients, adapters."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kd_d2.blocks import (
    BCE,
    KL,
    L1,
    QFL,
    Adapter,
    Const,
    ConvAdapter,
    Cosine,
    Elements,
    Flatten,
    Images,
    L2Norm,
    LinearAdapter,
    MapSource,
    PairDistiller,
    PairTerm,
    Positives,
    Region,
    Sigmoid,
    SmoothL1,
    Softmax,
    SpatialSoftmax,
    SquaredL2,
    Standardise,
    Weights,
)
from kd_d2.blocks.pair import Pair
from kd_d2.blocks.sources import Source
from kd_d2.distillation import Assignment, KeyInfo
from tests.blocks.support import ToyView, cell_grid, toy_ctx

GRIDS = (cell_grid(8, 4, 3), cell_grid(16, 2, 2))
N, C = 2, 5


def _values(seed, channels=C, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(N, channels, g.height, g.width, generator=generator).to(dtype) for g in GRIDS
    ]


class Given(Source):
    """Maps of two levels; ``key`` and the order of levels as a real source would have them."""

    def __init__(self, student, teacher, levels=(0, 1)):
        self.student, self.teacher, self.levels = student, teacher, levels
        self.student_needs = ("neck",)
        self.widths = tuple((student[i].shape[1], teacher[i].shape[1]) for i in levels)

    def __call__(self, ctx):
        grids = tuple(GRIDS[i] for i in self.levels)
        return [
            Pair(self.student[i], self.teacher[i], True, grids, n, "neck")
            for n, i in enumerate(self.levels)
        ]


class Given01(Region):
    """Weights that differ from image to image and cell to cell; a third of them 0."""

    @staticmethod
    def of(level):
        generator = torch.Generator().manual_seed(90 + level)
        shape = (N, GRIDS[level].height, GRIDS[level].width)
        weights = torch.rand(shape, generator=generator)
        return weights * (torch.rand(shape, generator=generator) > 0.33)

    def __call__(self, ctx, pair):
        return self.of(GRIDS.index(pair.grids[pair.level]))


class Nowhere(Region):
    def __call__(self, ctx, pair):
        return torch.zeros(pair.positions)


def _ctx(positive=(3, 0)):
    labels = torch.full((N, 20), 3)
    for row, number in zip(labels, positive):
        row[:number] = 1
    assignment = Assignment(labels, torch.zeros(N, 20, 4), num_classes=3)
    return toy_ctx([[], []], None, ToyView({"assign": assignment}))


def _sum(level, student, teacher):
    """Weighted sum of squares of a level, one number after another."""
    weights, total = Given01.of(level), 0.0
    for n in range(N):
        for y in range(GRIDS[level].height):
            for x in range(GRIDS[level].width):
                for c in range(C):
                    gap = student[level][n, c, y, x].item() - teacher[level][n, c, y, x].item()
                    total += weights[n, y, x].item() * gap**2
    return total


NORMALISERS = {
    "elements": (Elements(), lambda w: C * sum(v > 0 for v in w)),
    "weights": (Weights(), sum),
    "2weights": (Weights(2.0), lambda w: 2 * sum(w)),
    "2weights x C": (Weights(2.0, channels=True), lambda w: 2 * C * sum(w)),
    "floor": (Weights(floor=1000.0), lambda w: 1000.0),
    "weights + eps": (Weights(eps=0.5), lambda w: sum(w) + 0.5),
    "images": (Images(), lambda w: N),
    "images x C": (Images(channels=True), lambda w: N * C),
    "positives of the rank": (Positives("rank"), lambda w: 3 + 1),  # at least 1 an image
    "positives of all ranks": (Positives("ranks"), lambda w: 3 + 1),
    "const": (Const(7.0), lambda w: 7.0),
}


@pytest.mark.parametrize("levels", ["sum", "mean"])
@pytest.mark.parametrize("name", NORMALISERS)
def test_normalisers_and_levels_by_hand(name, levels):
    normaliser, divisor = NORMALISERS[name]
    student, teacher = _values(0), _values(1)
    term = PairTerm(Given(student, teacher), region=Given01(), normaliser=normaliser, levels=levels)
    term.bind({}, {})
    expected = [
        _sum(level, student, teacher) / divisor(Given01.of(level).flatten().tolist())
        for level in (0, 1)
    ]
    expected = sum(expected) / (2 if levels == "mean" else 1)
    value = term(_ctx())
    assert value.shape == () and value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", NORMALISERS)
def test_an_empty_region_is_a_connected_zero(name):
    student = [x.requires_grad_() for x in _values(0)]
    term = PairTerm(Given(student, _values(1)), region=Nowhere(), normaliser=NORMALISERS[name][0])
    value = term(_ctx((0, 0)))
    value.backward()
    assert value.item() == 0
    assert all(x.grad is not None and not x.grad.any() for x in student)


def test_positives_are_reduced_once_a_step(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "kd_d2.blocks.normalisers.reduce_mean", lambda x: calls.append(x.item()) or x * 2
    )
    term = PairTerm(Given(_values(0), _values(1)), normaliser=Positives())
    other = PairTerm(Given(_values(0), _values(1)), normaliser=Positives("rank"))
    ctx = _ctx((3, 2))
    first, second = term(ctx), term(ctx)
    assert calls == [5.0] and torch.equal(first, second)
    assert other(ctx).item() == pytest.approx(2 * first.item()) and calls == [5.0]


DISTANCES = {
    SquaredL2: lambda s, t: sum((a - b) ** 2 for a, b in zip(s, t)),
    L1: lambda s, t: sum(abs(a - b) for a, b in zip(s, t)),
    SmoothL1: lambda s, t: sum(
        0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in zip(s, t)
    ),
    BCE: lambda s, t: -sum(
        _sigmoid(b) * math.log(_sigmoid(a)) + (1 - _sigmoid(b)) * math.log(1 - _sigmoid(a))
        for a, b in zip(s, t)
    ),
    QFL: lambda s, t: -sum(
        abs(_sigmoid(a) - _sigmoid(b))
        * (_sigmoid(b) * math.log(_sigmoid(a)) + (1 - _sigmoid(b)) * math.log(1 - _sigmoid(a)))
        for a, b in zip(s, t)
    ),
    KL: lambda s, t: sum(q * (math.log(q) - math.log(p)) for p, q in zip(_softmax(s), _softmax(t))),
    Cosine: lambda s, t: 1
    - sum(a * b for a, b in zip(s, t)) / math.sqrt(sum(a * a for a in s) * sum(b * b for b in t)),
}


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _softmax(row):
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: d.__name__)
def test_distances_of_positions_by_hand(distance, rows):
    student, teacher = _values(0)[0], _values(1)[0]
    pair = Pair(student, teacher, True, GRIDS, 0, "neck")
    if rows:
        flat = [x.flatten(2).transpose(1, 2) for x in (student, teacher)]
        pair = Pair(*flat, False, GRIDS, 0, "pred.cls")
    found = distance()(None, pair)
    assert tuple(found.shape) == pair.positions
    found = found.reshape(N, GRIDS[0].height, GRIDS[0].width)
    for n in range(N):
        for y in range(GRIDS[0].height):
            for x in range(GRIDS[0].width):
                expected = DISTANCES[distance](
                    student[n, :, y, x].tolist(), teacher[n, :, y, x].tolist()
                )
                assert found[n, y, x].item() == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_parameters_of_distances():
    s, t = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.5]])
    pair = Pair(s, t, False)
    assert SquaredL2(0.5)(None, pair).item() == pytest.approx(0.5 * 4.25)
    assert SmoothL1(0.25)(None, pair).item() == pytest.approx((2 - 0.125) + (0.5 - 0.125))
    logits = Pair(torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 0.0]]), False)
    assert KL()(None, logits).item() == pytest.approx(0.433040, abs=1e-6)
    # LD's classification term: temperature 2, mean over the classes
    assert KL(2.0, "mean")(None, logits).item() == pytest.approx(0.164379, abs=1e-6)
    quarter = Pair(torch.zeros(1, 1), torch.tensor([[math.log(3)]]), False)
    assert QFL(1.0)(None, quarter).item() == pytest.approx(0.173287, abs=1e-6)
    assert QFL(2.0)(None, quarter).item() == pytest.approx(0.173287 / 4, abs=1e-6)
    assert Cosine()(None, Pair(torch.tensor([[1.0, 0]]), torch.ones(1, 2), False)).item() == (
        pytest.approx(0.292893, abs=1e-6)
    )


def test_transforms_by_hand():
    student, teacher = _values(0)[0], _values(1)[0]
    pair = Pair(student, teacher, True, GRIDS, 0, "neck")
    for transform, function in (
        (Sigmoid(), lambda x: 1 / (1 + (-x).exp())),
        (L2Norm(), lambda x: x / x.square().sum(1, keepdim=True).sqrt()),
        (Softmax(2.0), lambda x: (x / 2).exp() / (x / 2).exp().sum(1, keepdim=True)),
        (
            SpatialSoftmax(0.5),
            lambda x: (2 * x).exp() / (2 * x).exp().sum((2, 3), keepdim=True),
        ),
        (
            Standardise(),
            lambda x: (x - x.mean((0, 2, 3), keepdim=True))
            / (x.transpose(0, 1).flatten(1).std(1).view(1, -1, 1, 1) + 1e-6),
        ),
    ):
        found = transform(pair)
        torch.testing.assert_close(found.student, function(student))
        torch.testing.assert_close(found.teacher, function(teacher))
        assert found.maps and found.grids == GRIDS
    flat = Flatten()(pair)
    assert flat.positions == (N, C) and not flat.grids and flat.student.shape == (N, C, 12)
    rows = Pair(student.flatten(2).transpose(1, 2), teacher, False, GRIDS, 0, "pred.cls")
    assert torch.equal(Softmax()(rows).student, rows.student.softmax(-1))
    with pytest.raises(ValueError, match="SpatialSoftmax works on maps.*'pred.cls' are rows"):
        SpatialSoftmax()(rows)


def test_channel_wise_distillation_of_blocks():
    # KL of every channel's distribution over the positions, over N * C: 0.130812 for T = [0, ln 3]
    teacher = torch.tensor([0.0, math.log(3)]).view(1, 1, 1, 2).repeat(2, 3, 1, 1)

    class One(Given):
        def __call__(self, ctx):
            return [Pair(torch.zeros(2, 3, 1, 2), teacher, True, (cell_grid(8, 1, 2),), 0, "neck")]

    source = One([teacher, teacher], [teacher, teacher], (0,))
    for tau, expected in ((1.0, 0.130812), (2.0, 0.145363)):
        term = PairTerm(
            source, transform=Flatten(), distance=KL(tau), normaliser=Images(channels=True)
        )
        assert term(_ctx()).item() == pytest.approx(expected, abs=1e-6)


def test_images_times_channels_counts_the_channels_of_rows():
    rows = torch.zeros(N, 12, 7)
    pair = Pair(rows, rows, False, GRIDS[:1], None, "pred.cls")
    assert Images(channels=True)(_ctx(), pair, torch.ones(N, 12)).item() == N * 7
    pooled = torch.zeros(30, 256, 7, 7)
    roi = Pair(pooled, pooled, True, (), None, "roi.feat")
    assert Images(channels=True)(_ctx(), roi, torch.ones(30, 7, 7)).item() == N * 256


def test_weights_of_rows_hold_for_everything_behind_them():
    # distributions of four box sides: (N, R) weights, (N, R, 4) values
    logits = torch.randn(1, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    target = torch.randn(1, 2, 4, 3, generator=torch.Generator().manual_seed(1))

    class Sides(Given):
        def __call__(self, ctx):
            return [Pair(logits, target, False, (), None, "pred.box")]

    class Second(Region):
        def __call__(self, ctx, pair):
            return torch.tensor([[0.0, 0.5]])

    source = Sides(_values(0), _values(0), (0,))
    term = PairTerm(source, region=Second(), distance=KL(), normaliser=Weights())
    each = F.kl_div(
        logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True
    )
    expected = 0.5 * each[0, 1].sum() / (0.5 * 4)
    assert term(_ctx()).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_has_no_part_where_the_weight_is_zero(bad):
    student, teacher = _values(0), _values(1)
    zero = (Given01.of(0) == 0).nonzero()[0]
    teacher[0][zero[0], :, zero[1], zero[2]] = bad
    clean = PairTerm(Given(student, _values(1)), region=Given01())(_ctx())
    assert torch.equal(PairTerm(Given(student, teacher), region=Given01())(_ctx()), clean)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("distance", DISTANCES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("transform", [None, Standardise(), SpatialSoftmax()])
def test_half_precision_is_finite_and_near_to_full(distance, transform, dtype, tolerance):
    def run(dtype):
        student = [x.requires_grad_() for x in _values(0, dtype=dtype)]
        term = PairTerm(
            Given(student, _values(1, dtype=dtype)),
            region=Given01(),
            transform=transform,
            distance=distance(),
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            value = term(_ctx())
        value.backward()
        assert all(torch.isfinite(x.grad).all() and x.grad.any() for x in student)
        return value

    found, expected = run(dtype), run(torch.float32)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-5)


def test_values_beyond_the_range_of_fp16_are_squared_in_fp32():
    student = [torch.full_like(x, 400.0).half() for x in _values(0)]
    teacher = [torch.full_like(x, -400.0).half() for x in _values(0)]
    assert PairTerm(Given(student, teacher))(_ctx()).item() == pytest.approx(2 * 640000.0)


def test_gradients_reach_the_student_and_not_the_teacher():
    student, teacher = ([x.requires_grad_() for x in _values(i)] for i in (0, 1))
    adapter = ConvAdapter(1)
    term = PairTerm(Given(student, teacher), region=Given01(), adapter=adapter)
    term.bind({}, {})
    term(_ctx()).backward()
    assert all(x.grad is None for x in teacher)
    for level, x in enumerate(student):
        on = Given01.of(level)[:, None] > 0
        assert (x.grad.abs().sum(1, keepdim=True) > 0).equal(on)
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


# --------------------------------------------------------------------------------- adapters
@pytest.mark.parametrize("kernel", [1, 3])
def test_conv_adapters_have_the_teachers_width_level_by_level(kernel):
    adapter = ConvAdapter(kernel)
    adapter.build([(4, 6), (4, 7)])
    shapes = [tuple(layer.weight.shape) for layer in adapter.layers]
    assert shapes == [(6, 4, kernel, kernel), (7, 4, kernel, kernel)]
    x = torch.randn(2, 4, 5, 3)
    for index, width in enumerate((6, 7)):
        layer = adapter.layers[index]
        expected = F.conv2d(x, layer.weight, layer.bias, padding=kernel // 2)
        assert torch.equal(adapter(x, index), expected) and expected.shape == (2, width, 5, 3)


def test_options_of_conv_adapters():
    adapter = ConvAdapter(3, relu=True, std=1e-4)
    adapter.build([(64, 64)])
    weight = adapter.layers[0][0].weight
    assert weight.abs().max() <= 2e-4 and weight.std().item() == pytest.approx(0.88e-4, rel=0.05)
    assert not adapter.layers[0][0].bias.any()
    assert (adapter(torch.randn(1, 64, 4, 4), 0) >= 0).all()
    needed = ConvAdapter(only_if_needed=True)
    needed.build([(4, 4), (4, 6)])
    assert isinstance(needed.layers[0], nn.Identity) and isinstance(needed.layers[1], nn.Conv2d)
    shared = ConvAdapter(shared=True)
    shared.build([(4, 6), (4, 6)])
    assert len(shared.layers) == 1
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(shared(x, 0), shared(x, 1))
    with pytest.raises(ValueError, match=r"shared by all levels needs equal widths.*\(4, 7\)"):
        ConvAdapter(shared=True).build([(4, 6), (4, 7)])


def test_linear_adapters_work_on_rows():
    adapter = LinearAdapter()
    adapter.build([(4, 6)])
    rows = torch.randn(3, 4)
    layer = adapter.layers[0]
    torch.testing.assert_close(adapter(rows, 0), rows @ layer.weight.t() + layer.bias)
    same = LinearAdapter(only_if_needed=True)
    same.build([(4, 4)])
    assert adapter(rows, 0).shape == (3, 6) and same(rows, 0) is rows


class Scaled(Adapter):
    """Multiplies by a parameter and notes what it was called with."""

    def build(self, widths):
        self.calls, self.builds = [], getattr(self, "builds", 0) + 1
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, student, index):
        self.calls.append(index)
        return self.factor * student


def _keys(**widths):
    return {name: KeyInfo(width, (8, 16)) for name, width in widths.items()}


def _distiller(terms, student=None, teacher=None):
    return PairDistiller(
        terms=terms,
        weights={name: 1.0 for name in terms},
        student_keys=student or {},
        teacher_keys=teacher or {},
    )


def test_a_shared_adapter_is_built_once_and_runs_once_a_step():
    student = [x.requires_grad_() for x in _values(0)]
    adapter, teacher = Scaled(), _values(1)
    source = Given(student, teacher)
    terms = {
        "near": PairTerm(source, adapter=adapter, region=Given01()),
        "far": PairTerm(source, adapter=adapter, distance=L1()),
    }
    distiller = _distiller(terms)
    assert adapter.builds == 1 and [p.shape for p in distiller.parameters()] == [()]
    together = distiller(_ctx())
    assert adapter.calls == [0, 1]
    for name, term in terms.items():  # as each alone
        assert torch.equal(term(_ctx()), together[name])
    assert adapter.calls == [0, 1] * 3


def test_a_shared_adapter_does_not_confuse_levels():
    student, teacher = _values(0), _values(1)
    adapter = Scaled()
    fine = PairTerm(Given(student, teacher, (0,)), adapter=adapter)
    coarse = PairTerm(Given(student, teacher, (1,)), adapter=adapter)
    found = _distiller({"fine": fine, "coarse": coarse})(_ctx())
    for level, name in enumerate(("fine", "coarse")):
        expected = (2 * student[level] - teacher[level]).square().mean()
        torch.testing.assert_close(found[name].detach(), expected)


def test_a_shared_adapter_needs_equal_widths():
    adapter = ConvAdapter()
    narrow = PairTerm(Given(_values(0), _values(1)), adapter=adapter)
    wide = PairTerm(Given(_values(0), _values(1, channels=7)), adapter=adapter)
    with pytest.raises(ValueError, match=r"term 'wide': an adapter is shared.*\(5, 5\).*\(5, 7\)"):
        _distiller({"narrow": narrow, "wide": wide})


def test_widths_without_adapter():
    term = PairTerm(MapSource("neck"))
    with pytest.raises(ValueError, match=r"'neck' has 4 channels in the student and 6.*adapter"):
        term.bind(_keys(neck=4), _keys(neck=6))


def test_wrong_levels():
    with pytest.raises(ValueError, match=r"\['mean', 'sum'\], got 'max'"):
        PairTerm(Given(_values(0), _values(1)), levels="max")


def test_needs_of_a_distiller_are_those_of_its_blocks():
    terms = {
        "a": PairTerm(MapSource("neck"), normaliser=Positives()),
        "b": PairTerm(MapSource("head.cls[1]", "head.cls[2]")),
    }
    keys = {**_keys(neck=4), "head.cls[1]": KeyInfo(4, (8,)), "head.cls[2]": KeyInfo(4, (8,))}
    distiller = _distiller(terms, keys, keys)
    assert distiller.student_needs == {"neck", "assign", "head.cls[1]"}
    assert distiller.teacher_needs == {"neck", "head.cls[2]"}
    assert distiller.terms == ("a", "b")


def test_errors_name_distiller_and_term():
    terms = {"first": PairTerm(MapSource("neck")), "second": PairTerm(MapSource("nick"))}
    with pytest.raises(ValueError, match="^PairDistiller, term 'second': MapSource.*'nick'"):
        _distiller(terms, _keys(neck=4), _keys(neck=4))
