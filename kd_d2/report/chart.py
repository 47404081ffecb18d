"""Line charts as SVG. The page's script adds what the pointer shows; they work without it."""

import json
import math
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from kd_d2.visualization.html import Html, element

from .series import Chart

__all__ = ["ScaleY", "line_chart", "run_classes", "ticks"]

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34

NUM_COLOURS = 10
# up to so many points are marked
_FEW = 40
# positive values over more than this ratio are drawn logarithmically
_LOG_RATIO = 100.0


class ScaleY(NamedTuple):
    """The vertical axis: values between ``low`` and ``high``."""

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> "ScaleY":
        low, high = min(values), max(values)
        if low > 0 and high / low > _LOG_RATIO:
            return cls(low, high, True)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        # nothing below zero where no value is
        bottom = max(0.0, low - margin) if low >= 0 else low - margin
        return cls(bottom, high + margin, False)

    def place(self, value: float) -> float:
        """0 at the lower end, 1 at the upper one."""
        if self.log:
            low, high, value = (math.log(x) for x in (self.low, self.high, value))
            return (value - low) / (high - low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> List[float]:
        if not self.log:
            return ticks(self.low, self.high, 4)
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        step = max(1, (last - first) // 4)
        return [10.0**e for e in range(first, last + 1, step)]


def ticks(low: float, high: float, count: int) -> List[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten) between two others."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def run_classes(index: int) -> str:
    """CSS classes that give a run its colour, and dashes when the colours are used up."""
    dashes = index // NUM_COLOURS
    return f"run-colour c{index % NUM_COLOURS}" + (f" d{(dashes - 1) % 3}" if dashes else "")


def line_chart(chart: Chart, titles: Sequence[str], note: str = "") -> Html:
    """A figure with the curves of all runs over the iterations.

    Args:
        titles: of all runs, by index.
        note: small print below.
    """
    xs = [x for _, points in chart.curves for x, _ in points]
    scale = ScaleY.of([y for _, points in chart.curves for _, y in points])
    x_low, x_high = min(xs), max(xs)
    if x_high == x_low:
        x_low, x_high = x_low - 1, x_high + 1
    inner_w, inner_h = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> Tuple[float, float]:
        return (
            round(LEFT + (x - x_low) / (x_high - x_low) * inner_w, 1),
            round(TOP + (1 - scale.place(y)) * inner_h, 1),
        )

    parts: List[Html] = []
    for value in scale.ticks():
        _, y = place(x_low, value)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(element("text", _short(value), x=LEFT - 6, y=y + 4, text_anchor="end"))
    for value in ticks(x_low, x_high, 4):
        if value < 0:
            continue
        x, _ = place(value, scale.low)
        parts.append(element("text", _short(value), x=x, y=HEIGHT - 18, text_anchor="middle"))
    parts.append(
        element("text", "iteration", x=LEFT + inner_w / 2, y=HEIGHT - 4, text_anchor="middle")
    )
    bottom = HEIGHT - BOTTOM
    parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis"))
    for index, points in chart.curves:
        parts.append(_curve([place(*p) for p in points], index, titles[index]))
    svg = element(
        "svg",
        element("title", f"{chart.title} over the iterations"),
        parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
        data_scale=json.dumps([x_low, x_high, LEFT, WIDTH - RIGHT, TOP, bottom]),
        data_curves=json.dumps(_values(chart), separators=(",", ":")),
    )
    unit = element("span", " (logarithmic)", class_="small") if scale.log else None
    caption = element("figcaption", element("code", chart.title), unit)
    small = element("p", note, class_="small") if note else None
    return element("figure", caption, svg, small, class_="card")


def _values(chart: Chart) -> List[Dict[str, Any]]:
    """What the pointer shows, five digits."""
    return [
        {
            "run": index,
            "x": [round(x) for x, _ in points],
            "y": [float(f"{y:.5g}") for _, y in points],
        }
        for index, points in chart.curves
    ]


def _curve(points: List[Tuple[float, float]], index: int, title: str) -> Html:
    path = "M" + "L".join(f"{x:g},{y:g}" for x, y in points)
    marks = [element("circle", cx=x, cy=y, r=2.4) for x, y in points] if len(points) <= _FEW else []
    return element(
        "g",
        element("title", title),
        element("path", d=path),
        marks,
        class_=f"curve {run_classes(index)}",
        data_run=index,
    )


def _short(value: float) -> str:
    if abs(value) >= 10000 and value % 1000 == 0:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
