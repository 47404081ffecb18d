import numpy as np
from matplotlib import pyplot as plt

from kd_d2.visualization import draw_matrices


def test_matrices_share_a_scale_and_name_their_classes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    path = tmp_path / "matrices.png"
    first, second = np.array([[0.0, 0.5], [0.25, 0.0]]), np.array([[0.0, 2.0], [1.0, 0.0]])
    draw_matrices([("a", first), ("b", second)], str(path), ("cat", "dog"), "difference")
    assert path.stat().st_size > 1000
    left, right, bar = figures[0].axes
    assert left.get_title() == "a" and right.get_title() == "b"
    for axis, matrix in ((left, first), (right, second)):
        (image,) = axis.images
        assert np.array_equal(image.get_array(), matrix) and image.get_clim() == (0, 2)
        assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog"]
    assert bar.get_ylabel() == "difference"
    monkeypatch.undo()
    plt.close(figures[0])


def test_zeros_and_many_classes(tmp_path):
    path = tmp_path / "matrices.png"
    draw_matrices([("a", np.zeros((31, 31)))], str(path), [str(i) for i in range(31)])
    assert path.stat().st_size > 1000
