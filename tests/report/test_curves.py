"""Choice of curves, their points, and where they are drawn."""

import json
import re

import pytest

from kd_d2.report import Run
from kd_d2.report.chart import ScaleY, line_chart, run_classes, ticks
from kd_d2.report.series import TOTAL, Chart, chart_groups, thin


def test_groups():
    values = [(19, 1.0), (39, 0.5)]
    first = Run("a", "a", series={
        "loss_cls": values, "loss_box": values, "loss_kd/pkd/feat": values, "lr": values,
        "kd_raw/pkd/feat": values, "kd_factor/pkd": values, "kd_grad_ratio/pkd": values,
        "kd_grad_cosine/pkd": values,
        "total_loss": values, "bbox/AP": [(39, 7.0)], "bbox/AP-cat": [(39, 7.0)],
        "tide/Cls": [(39, 1.0)], "tide/Cls-50": [(39, 1.0)], "time": values,
        "teacher/d/AP": [(0, 60.0)], "num_pos_anchors": values,
    })  # fmt: skip
    second = Run("b", "b", series={"loss_cls": values})
    groups = {g.title: g for g in chart_groups([second, first])}
    assert {title: [c.title for c in g.charts] for title, g in groups.items()} == {
        "Accuracy": ["bbox/AP", "teacher/d/AP"],
        "Losses": [TOTAL, "total_loss", "loss_box", "loss_cls"],
        "Distillation terms, weighted": ["loss_kd/pkd/feat"],
        "Distillation terms before their weights": ["kd_raw/pkd/feat"],
        "Factors of the schedules": ["kd_factor/pkd"],
        "Gradients of the methods relative to the detector's": [
            "kd_grad_cosine/pkd",
            "kd_grad_ratio/pkd",
        ],
        "Learning rate": ["lr"],
        "Other scalars": ["num_pos_anchors", "tide/Cls"],
    }
    assert [g.title for g in groups.values() if g.folded] == ["Other scalars"]
    assert list(groups)[:2] == ["Accuracy", "Losses"]
    total, _, _, loss_cls = groups["Losses"].charts
    # the detector's losses, without distillation
    assert total.curves == [(0, [(19, 1.0), (39, 0.5)]), (1, [(19, 2.0), (39, 1.0)])]
    assert [index for index, _ in loss_cls.curves] == [0, 1]
    assert chart_groups([Run("a", "a")]) == []


def test_thinning_averages_neighbours():
    values = [(i, float(i)) for i in range(10)]
    assert thin(values, 10) == values
    assert thin(values, 5) == [(0.5, 0.5), (2.5, 2.5), (4.5, 4.5), (6.5, 6.5), (8.5, 8.5)]
    assert len(thin([(i, 1.0) for i in range(1001)], 300)) == 300


def test_ticks():
    assert ticks(0, 1000, 4) == [0, 250, 500, 750, 1000]
    assert ticks(0.13, 0.31, 4) == [0.15, 0.2, 0.25, 0.3]
    assert ticks(5, 5, 4) == [5]


def test_vertical_axis():
    scale = ScaleY.of([1.0, 2.0])
    assert not scale.log and (scale.low, scale.high) == (0.95, 2.05)
    assert scale.place(1.5) == pytest.approx(0.5)
    assert ScaleY.of([0.0, 2.0]).low == 0  # no room below what cannot be there
    assert ScaleY.of([-1.0, 1.0]).low == pytest.approx(-1.1)
    assert ScaleY.of([3.0]).low < 3 < ScaleY.of([3.0]).high
    assert ScaleY.of([0.0]).low < ScaleY.of([0.0]).high
    log = ScaleY.of([0.01, 100.0])
    assert log.log and log.place(1.0) == pytest.approx(0.5)
    assert log.ticks() == [0.01, 0.1, 1, 10, 100]


def test_points_are_where_they_belong():
    svg = line_chart(Chart("lr", [(1, [(0, 0.0), (50, 1.0), (100, 2.0)])]), ["a", "<b>"])
    left, right, top, bottom = json.loads(re.search(r'data-scale="([^"]*)"', svg)[1])[2:]
    path = re.search(r'<path d="M([^"]*)"', svg)[1]
    points = [tuple(map(float, p.split(","))) for p in path.split("L")]
    xs, ys = zip(*points)
    assert xs == (left, pytest.approx((left + right) / 2), right)
    # the axis ends a twentieth above the highest value
    height = bottom - top
    assert ys == pytest.approx([bottom, bottom - height / 2.1, bottom - 2 * height / 2.1], abs=0.06)
    assert "&lt;b&gt;" in svg and "<b>" not in svg
    values = json.loads(re.search(r'data-curves="([^"]*)"', svg)[1].replace("&quot;", '"'))
    assert values == [{"run": 1, "x": [0, 50, 100], "y": [0.0, 1.0, 2.0]}]


def test_twenty_runs_look_different():
    assert len({run_classes(i) for i in range(20)}) == 20
