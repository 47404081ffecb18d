import pytest
from matplotlib import pyplot as plt

from kd_d2.visualization import draw_bars


def test_bars_show_means_deviations_and_runs(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    path = tmp_path / "bars.png"
    draw_bars([("one", [("a", [1.0, 2.0, 6.0]), ("b", [4.0])]), ("two", [("c", [5.0])])], str(path))
    assert path.stat().st_size > 1000
    first, second = figures[0].axes
    assert first.get_title() == "one" and second.get_title() == "two"
    assert [bar.get_height() for bar in first.patches] == [3.0, 4.0]
    assert [label.get_text() for label in first.get_xticklabels()] == ["a", "b"]
    # deviations of 1, 2, 6 from their mean 3: -2, -1, 3; (4 + 1 + 9) / 2 = 7
    (error,) = [c for c in first.containers if hasattr(c, "has_yerr")]
    (segment,) = error[2][0].get_segments()
    assert segment[:, 1] == pytest.approx([3 - 7**0.5, 3 + 7**0.5])
    dots = [list(line.get_ydata()) for line in first.lines if line.get_marker() == "."]
    assert dots == [[1.0, 2.0, 6.0], [4.0]]
    monkeypatch.undo()
    plt.close(figures[0])
