"""Losses of real detectors against the formulas, and the worked-out numbers of the composites."""

import dataclasses
import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from kd_d2.modeling.layers import DistributionBox2BoxTransform
from kd_d2.modeling.meta_arch.fcos import PointBox2BoxTransform
from kd_d2.projects.crosskd import CrossKD, normalisers
from kd_d2.projects.crosskd.presets import OFFICIAL
from tests.fixtures import teacher_of, tiny_batch, tiny_model
from tests.projects.crosskd import reference
from tests.projects.crosskd.cases import (
    DETECTORS,
    NUM_STAGES,
    Side,
    context,
    kd_model,
    kd_terms,
    pair,
    rows,
    run,
)

LN3 = math.log(3)
SIZES = ((128, 96), (64, 128))  # each image is padded
every_detector = pytest.mark.parametrize("name", list(DETECTORS))


def _assert_terms(actual, expected, rtol=2e-5):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=1e-6, msg=name)


# ---------------------------------------------------------------- real detectors, all formulas


@every_detector
@pytest.mark.parametrize("position", range(NUM_STAGES + 1))
def test_cross_terms_follow_the_formulas(name, position):
    student, teacher = pair(name)
    batch = tiny_batch(sizes=SIZES)
    actual = kd_terms(run(kd_model(name, POSITION=position), batch))
    with torch.no_grad():
        expected = reference.Batch(student, teacher.model, batch)
        sides = (student, expected.student_features, teacher.model, expected.teacher_features)
        predictions = {}
        for branch in ("cls", "box"):
            predictions.update(
                reference.cross_predictions(*sides, branch, position, aligned=True, pre_act=False)
            )
        _assert_terms(actual, expected.terms(predictions))


@every_detector
@pytest.mark.parametrize("batch", ["padded", "no ground truth", "one without", "odd sizes"])
def test_mimicking_compares_the_own_predictions(name, batch):
    """Position n + 1 and mode "mimic" are D(p^s, p^t), term by term, in every kind of batch."""
    batch = {
        "padded": lambda: tiny_batch(sizes=SIZES),
        "no ground truth": lambda: tiny_batch(num_gt=0),
        "one without": lambda: tiny_batch(num_gt=(2, 0)),
        "odd sizes": lambda: tiny_batch(sizes=((101, 67), (35, 121))),
    }[batch]()
    student, teacher = pair(name)
    with torch.no_grad():
        expected = reference.Batch(student, teacher.model, batch)
        expected = expected.terms(reference.own_predictions(student, expected.student_features))
    _assert_terms(kd_terms(run(kd_model(name, POSITION=NUM_STAGES + 1), batch)), expected)
    _assert_terms(kd_terms(run(kd_model(name, MODES=("mimic",)), batch)), expected)


@pytest.mark.parametrize("strategy", ["b", "c", "d"])
def test_strategies_compare_what_fig_6_says(strategy):
    student, teacher = pair("GFL")
    batch = tiny_batch()
    actual = kd_terms(run(kd_model("GFL", STRATEGY=strategy), batch))
    with torch.no_grad():
        expected = reference.Batch(student, teacher.model, batch)
        own = reference.own_predictions(student, expected.student_features)
        sides = [
            (student, expected.student_features),
            (teacher.model, expected.teacher_features),
        ]
        moved, host = sides if strategy == "c" else sides[::-1]
        cross = {}
        for branch in ("cls", "box"):
            cross.update(
                reference.cross_predictions(*moved, *host, branch, 1, aligned=True, pre_act=False)
            )
        predictions, targets = {
            "b": (own, cross),
            "c": (own, cross),
            "d": (cross, expected.target),
        }[strategy]
        _assert_terms(actual, expected.terms(predictions, targets))


@pytest.mark.parametrize("name", ["GFL", "RetinaNet"])
def test_before_the_activation(name):
    student, teacher = pair(name)
    batch = tiny_batch()
    before = kd_terms(run(kd_model(name, TAP="pre_act"), batch))
    after = kd_terms(run(kd_model(name, TAP="post_act"), batch))
    with torch.no_grad():
        expected = reference.Batch(student, teacher.model, batch)
        sides = (student, expected.student_features, teacher.model, expected.teacher_features)
        predictions = {}
        for branch in ("cls", "box"):
            predictions.update(
                reference.cross_predictions(*sides, branch, 1, aligned=True, pre_act=True)
            )
        _assert_terms(before, expected.terms(predictions))
    for term in before:
        assert not torch.isclose(before[term], after[term], rtol=1e-3)


def test_a_position_of_its_own_for_each_branch():
    batch = tiny_batch()
    mixed = kd_terms(run(kd_model("ATSS", POSITION_CLS=0, POSITION_REG=3), batch))
    first = kd_terms(run(kd_model("ATSS", POSITION=0), batch))
    mimic = kd_terms(run(kd_model("ATSS", POSITION=3), batch))
    assert set(mixed) == {"cls", "reg", "ctr"}
    assert mixed["cls"] == first["cls"] and mixed["reg"] == mimic["reg"]
    assert mixed["ctr"] == mimic["ctr"]  # the centerness sits on the box tower


def test_both_modes_add_up():
    batch = tiny_batch()
    both = kd_terms(run(kd_model("ATSS", MODES=("cross", "mimic")), batch))
    cross = kd_terms(run(kd_model("ATSS"), batch))
    mimic = kd_terms(run(kd_model("ATSS", MODES=("mimic",)), batch))
    assert both == {**cross, **{f"mimic_{k}": v for k, v in mimic.items()}}


def test_single_branches():
    batch = tiny_batch()
    every = kd_terms(run(kd_model("ATSS"), batch))
    assert kd_terms(run(kd_model("ATSS", BRANCHES=("cls",)), batch)) == {"cls": every["cls"]}
    reg = kd_terms(run(kd_model("ATSS", BRANCHES=("reg",)), batch))
    assert reg == {"reg": every["reg"], "ctr": every["ctr"]}


def test_centerness_of_fcos_on_request():
    """The preset has no such term; with a weight it is the term of ATSS, wherever it sits."""
    batch = tiny_batch()
    for name in ("FCOS", "FCOS-d2"):
        student, teacher = pair(name)
        losses = kd_terms(run(kd_model(name, CTR_WEIGHT=2.0, POSITION=3), batch))
        with torch.no_grad():
            expected = reference.Batch(student, teacher.model, batch)
            own = reference.own_predictions(student, expected.student_features)["ctr"]
            a, b = (
                reference.flat(x, 1, 1)[..., 0][expected.positive].sigmoid()
                for x in (own, expected.target["ctr"])
            )
            sums = -(b * a.log() + (1 - b) * (1 - a).log()).sum()
            assert expected.positive.sum() > 0
            torch.testing.assert_close(losses["ctr"], 2 * sums / expected.num_positive())


def test_paper_preset_divides_by_the_region():
    """Eq. 4 and 5 literally: |S| positions, regression at the positives with weight 1."""
    student, teacher = pair("RetinaNet")
    batch = tiny_batch()
    losses = kd_terms(run(kd_model("RetinaNet", PRESET="paper", POSITION=3), batch))
    with torch.no_grad():
        ref = reference.Batch(student, teacher.model, batch)
        own = reference.own_predictions(student, ref.student_features)
        official = ref.terms(own)
        foreground = ref._giou(own, ref.target)[ref.positive]
        expected = {
            "cls": official["cls"] * ref.num_positive() / ref.counted.sum(),
            "reg": foreground.mean(),
        }
        _assert_terms(losses, expected)
    # neither without ground truth
    empty = kd_terms(run(kd_model("RetinaNet", PRESET="paper", POSITION=3), tiny_batch(num_gt=0)))
    assert empty["reg"] == 0 and empty["cls"] > 0


def test_moving_average_as_normaliser():
    """The detector's own: 100 * 0.9 + 0.1 * positives after the first step of RetinaNet."""
    student = tiny_model("RetinaNet", 0)
    batch = tiny_batch()
    official = kd_terms(run(kd_model("RetinaNet"), batch))
    model = kd_model("RetinaNet", student, pair("RetinaNet")[1], NORMALIZER="ema")
    average = kd_terms(run(model, batch))
    with torch.no_grad():
        ref = reference.Batch(student, pair("RetinaNet")[1].model, batch)
        positives = int(((ref.labels >= 0) & (ref.labels < 3)).sum())
        factor = ref.num_positive() / (90.0 + 0.1 * positives)
    _assert_terms(average, {k: v.detach() * factor for k, v in official.items()})


def test_moving_average_of_a_detector_without_one():
    """Configs are refused earlier; this is for distillers that are built by hand."""
    model = kd_model("GFL")
    crosskd = model.distillers["crosskd"]
    crosskd.preset = dataclasses.replace(crosskd.preset, cls_normaliser="ema")
    with pytest.raises(ValueError, match='NORMALIZER "ema": GFL keeps no'):
        run(model, tiny_batch())


def test_partial_towers_with_one_norm_per_level():
    """Detectron2's CycleBatchNormList counts its calls: the cross pass runs all levels in order."""
    student, teacher = (
        tiny_model("RetinaNet", seed, **{"MODEL.RETINANET.NORM": "BN"}) for seed in (0, 1)
    )
    teacher = teacher_of(teacher)
    batch = tiny_batch()
    model = kd_model("RetinaNet", student, teacher)
    first, second = (kd_terms(run(model, batch)) for _ in range(2))
    _assert_terms(first, second)
    with torch.no_grad():
        student_levels, teacher_levels = (
            reference.pyramid(m, batch) for m in (student, teacher.model)
        )
        taps = []
        for m, levels in ((student, student_levels), (teacher.model, teacher_levels)):
            taps.append([m.head.cls_subnet[:3](x) for x in levels])
        rest = teacher.model.head.cls_subnet[3:]
        aligned = [reference.align(s, t).relu() for s, t in zip(*taps)]
        cross = [teacher.model.head.cls_score(rest(x)) for x in aligned]
        target = [m(x)[0] for m, x in ((teacher.model.head, teacher_levels),)][0]
        s, t = (reference.flat(x, 4, 3) for x in (cross, target))
        qfl = (s.sigmoid() - t.sigmoid()).abs() * torch.nn.functional.binary_cross_entropy(
            s.sigmoid(), t.sigmoid(), reduction="none"
        )
        model_anchors = student.anchor_generator(student_levels)
        labels = torch.stack(
            student.label_anchors(model_anchors, [x["instances"] for x in batch])[0]
        )
        mask = reference.inside(student_levels, [8, 16, 32, 64, 128], batch, 4) & (labels >= 0)
        counts = ((labels < 3) & mask).sum(dim=1).clamp(min=1).sum()
        torch.testing.assert_close(
            first["cls"], (qfl.sum(-1) * mask).sum() / counts, rtol=1e-4, atol=0
        )


# --------------------------------------------------------------- worked out, section 8 of ours

TEACHER_CLS = [[LN3, -LN3], [0.0, -LN3]]  # weights 0.75 and 0.5
CROSS_CLS = [[0.0, -LN3], [0.0, 0.0]]
KL_CROSS = [[math.log(2), 0.0, 0.0, 0.0] * 4, [math.log(2)] + [0.0] * 15]
POSITIVE, BACKGROUND, IGNORED = 0, 2, -1


def _distiller(preset, branches=("cls", "reg"), **options):
    """Compares the student's predictions with the teacher's: towers of 0 stages, position 1."""
    options.setdefault("centerness_branch", "reg" if preset == "ATSS" else "none")
    return CrossKD(
        preset=OFFICIAL[preset],
        positions={branch: 1 for branch in branches},
        num_stages={"cls": 0, "reg": 0},
        **options,
    )


def _values(distiller, codec, labels=(POSITIVE, BACKGROUND), boxes=None, **predictions):
    """Weighted terms; predictions are ``output=(cross, teacher)``."""
    predictions = {"cls": (CROSS_CLS, TEACHER_CLS), **predictions}
    student, teacher = ({f"pred.{k}": v[i] for k, v in predictions.items()} for i in (0, 1))
    ctx = context(student, teacher, codec, labels, **({} if boxes is None else {"boxes": boxes}))
    return {name: value.item() for name, value in distiller(ctx).items()}


class TestWorkedOut:
    @pytest.mark.parametrize("preset", ["GFL", "RetinaNet", "ATSS"])
    def test_classification(self, preset):
        codec = Box2BoxTransform((1, 1, 1, 1))
        distiller = _distiller(preset, ("cls",))
        assert _values(distiller, codec)["cls"] == pytest.approx(0.173287, abs=1e-6)
        ignored = _values(distiller, codec, labels=(POSITIVE, IGNORED))
        assert ignored["cls"] == pytest.approx(0.086643, abs=1e-6)

    def test_classification_of_fcos(self):
        """D is 2: two positives in the middle of their boxes."""
        distiller = _distiller("FCOS", ("cls",))
        codec = PointBox2BoxTransform(False)
        value = _values(distiller, codec, labels=(POSITIVE, POSITIVE))["cls"]
        assert value == pytest.approx(0.069315, abs=1e-6)
        # floored at 1 without positives, and positions without label weight count as well
        value = _values(distiller, codec, labels=(IGNORED, BACKGROUND))["cls"]
        assert value == pytest.approx(0.138629, abs=1e-6)

    @pytest.mark.parametrize(
        "region, expected", [("pos", 0.627741), ("neg", 0.693147), ("all", 1.320888)]
    )
    def test_binary_cross_entropy_by_region(self, region, expected):
        distiller = _distiller("GFL", ("cls",), cls_loss="bce", cls_region=region)
        codec = Box2BoxTransform((1, 1, 1, 1))
        assert _values(distiller, codec)["cls"] == pytest.approx(expected, abs=1e-6)

    def test_negatives_exclude_what_is_ignored(self):
        distiller = _distiller("GFL", ("cls",), cls_loss="bce", cls_region="neg")
        codec = Box2BoxTransform((1, 1, 1, 1))
        assert _values(distiller, codec, labels=(POSITIVE, IGNORED))["cls"] == 0

    def test_distributions(self):
        codec = DistributionBox2BoxTransform(reg_max=3, anchor_scale=1)
        box = (KL_CROSS, [[0.0] * 16] * 2)
        value = _values(_distiller("GFL", ("reg",)), codec, box=box)["reg"]
        assert value == pytest.approx(0.139599, abs=1e-6)
        # divided by the sum of the weights: the ignored position drops out of both sums
        value = _values(_distiller("GFL", ("reg",)), codec, (IGNORED, POSITIVE), box=box)["reg"]
        assert value == pytest.approx(4 * 0.049857 / 4, abs=1e-6)
        assert _values(_distiller("GFL", ("reg",)), codec, (IGNORED, IGNORED), box=box)["reg"] == 0

    @pytest.mark.parametrize(
        "preset, weights, raw", [("RetinaNet", (1, 1, 1, 1), 0.5), ("ATSS", (10, 10, 5, 5), 5.0)]
    )
    def test_decoded_boxes(self, preset, weights, raw):
        codec = Box2BoxTransform(weights)
        box = ([[raw, 0.0, 0.0, 0.0], [0.0] * 4], [[0.0] * 4] * 2)
        ctr = ([[0.0]] * 2, [[LN3]] * 2)
        distiller = _distiller(preset, ("reg",))
        value = _values(distiller, codec, box=box, ctr=ctr)["reg"]
        assert value == pytest.approx(0.25, abs=1e-6)
        value = _values(distiller, codec, (IGNORED, POSITIVE), box=box, ctr=ctr)["reg"]
        assert value == pytest.approx(0.0, abs=1e-6)

    def test_decoded_boxes_of_fcos(self):
        """Point (4, 4): distances 4, 2, 2, 2 against 2, 2, 2, 2."""
        target = [[math.log(2.0)] * 4] * 2
        cross = [[math.log(4.0)] + [math.log(2.0)] * 3, target[1]]
        ctx = context(
            {"pred.cls": CROSS_CLS, "pred.box": cross},
            {"pred.cls": TEACHER_CLS, "pred.box": target},
            PointBox2BoxTransform(False),
            (POSITIVE, POSITIVE),
            boxes=((2.0, 2.0, 6.0, 6.0),) * 2,
            anchor=(2, 2, 6, 6),
        )
        value = _distiller("FCOS", ("reg",))(ctx)["reg"].item()
        assert value == pytest.approx(0.114037, abs=1e-6)

    def test_centerness(self):
        codec = Box2BoxTransform((10, 10, 5, 5))
        box = ([[0.0] * 4] * 2,) * 2
        ctr = ([[0.0], [9.0]], [[LN3], [LN3]])
        value = _values(_distiller("ATSS", ("reg",)), codec, box=box, ctr=ctr)["ctr"]
        assert value == pytest.approx(0.346574, abs=1e-6)
        nothing = (BACKGROUND, BACKGROUND)
        assert _values(_distiller("ATSS", ("reg",)), codec, nothing, box=box, ctr=ctr)["ctr"] == 0

    def test_entropy_remains_at_equality(self):
        """BCE terms of equal predictions are entropies: 0.562335 at a probability of 0.75."""
        codec = Box2BoxTransform((10, 10, 5, 5))
        box = ([[0.0] * 4] * 2,) * 2
        ctr = ([[LN3], [LN3]],) * 2
        distiller = _distiller("ATSS", ("reg",))
        value = _values(distiller, codec, (POSITIVE, POSITIVE), box=box, ctr=ctr)["ctr"]
        assert value == pytest.approx(0.562335, abs=1e-6)

    def test_cross_predictions_take_the_place_of_the_own(self):
        """The same numbers when they come out of the teacher's head."""
        codec = Box2BoxTransform((1, 1, 1, 1))
        ctx = context(
            {"pred.cls": [[9.0, 9.0]] * 2, "head.cls[0]": [[1.0], [2.0]]},
            {"pred.cls": TEACHER_CLS, "head.cls[0]": [[5.0], [7.0]]},
            codec,
            (POSITIVE, BACKGROUND),
        )
        seen = []

        def rest_of_head(branch, start, features):
            seen.append((branch, start, features[0].flatten().tolist()))
            return {"cls": [rows(CROSS_CLS)]}

        ctx.teacher = Side(ctx.teacher, ctx.student.model, rest_of_head)
        distiller = CrossKD(
            preset=OFFICIAL["GFL"],
            positions={"cls": 0},
            num_stages={"cls": 0, "reg": 0},
            align="none",
        )
        assert distiller(ctx)["cls"].item() == pytest.approx(0.173287, abs=1e-6)
        assert seen == [("cls", 0, [1.0, 2.0])]

    @pytest.mark.parametrize(
        "tap, expected",
        [
            ("post_act", [0.190934, 0.190934, 2.603022, 5.015110]),
            ("pre_act", [0.0, 0.0, 3.143167, 4.786334]),  # of -1.786334, -0.143167, ...
        ],
    )
    def test_feature_that_changes_heads(self, tap, expected):
        key, activate = ("head.cls[1]", torch.relu)
        if tap == "pre_act":
            key, activate = ("head.cls[1]:pre", lambda x: x)
        sides = [
            {key: [activate(torch.tensor(x)).reshape(1, 1, 2, 2)], "pred.cls": None}
            for x in ([-2.0, -1.0, 1.0, 2.0], [-2.0, 0.0, 4.0, 4.0])
        ]
        moved = []

        def rest_of_head(branch, start, features):
            moved.extend(features)
            return {"cls": features}

        distiller = CrossKD(
            preset=OFFICIAL["GFL"], positions={"cls": 1}, num_stages={"cls": 1, "reg": 1}, tap=tap
        )
        assert key in distiller.student_needs and key in distiller.teacher_needs
        ctx = type("Context", (), {"student": Side(sides[0]), "teacher": None})
        ctx.teacher = Side(sides[1], None, rest_of_head)
        distiller._cross(ctx, "cls")
        assert moved[0].flatten().tolist() == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------ several ranks


@pytest.mark.parametrize(
    "name, averaged, local",
    [
        ("GFL", ("cls",), ("reg",)),
        ("RetinaNet", (), ("cls", "reg")),
        ("ATSS", ("cls", "reg", "ctr"), ()),
        ("FCOS", ("cls", "reg"), ()),
    ],
)
def test_which_normalisers_are_averaged_over_ranks(name, averaged, local, monkeypatch):
    batch = tiny_batch()
    alone = kd_terms(run(kd_model(name), batch))
    assert set(alone) == {*averaged, *local}
    monkeypatch.setattr(normalisers, "reduce_mean", lambda x: 4 * x)
    ranks = kd_terms(run(kd_model(name), batch))
    for term, value in alone.items():
        torch.testing.assert_close(ranks[term], value / 4 if term in averaged else value)
