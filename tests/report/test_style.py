"""Colours of the page: text can be read in both schemes, runs can be told apart."""

import re
from importlib import resources
from itertools import combinations

import pytest

STYLE = resources.files("kd_d2.report").joinpath("page.css").read_text()


def schemes():
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.S)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light))
    return {
        "light": colours,
        "dark": {**colours, **dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", dark))},
    }


def luminance(colour):
    """Relative luminance of sRGB, WCAG 2.1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(first, second):
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    colours = schemes()[scheme]
    for text in ("text", "soft", "link", "better", "worse"):
        for back in ("back", "card", "head"):
            assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
    assert contrast(colours["text"], colours["mark"]) >= 4.5
    for i in range(10):
        assert contrast(colours[f"c{i}"], colours["card"]) >= 3, i


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_runs_differ(scheme):
    colours = [schemes()[scheme][f"c{i}"] for i in range(10)]
    values = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours]
    for a, b in combinations(values, 2):
        assert sum(abs(x - y) for x, y in zip(a, b)) > 60, (a, b)
