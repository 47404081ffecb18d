"""Pictures of the analyses: heat maps over images, and curves with panels side by side."""

import math
from typing import Dict, List, Sequence, Tuple

import numpy as np

__all__ = ["draw_overlays", "draw_panels", "level_name"]


def level_name(stride: int) -> str:
    """Name of a pyramid level, e.g. "p3" for stride 8."""
    return f"p{round(math.log2(stride))}"


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_overlays(
    path: str,
    image: np.ndarray,
    boxes: Sequence[Sequence[float]],
    column_titles: Sequence[str],
    rows: Sequence[Tuple[str, Sequence[np.ndarray]]],
    side: float = 2.0,
) -> None:
    """Write a grid: the image with its ground truth, then heat maps over the darkened image.

    Args:
        path: PNG to write.
        image: (h, w, 3) uint8.
        boxes: XYXY in pixels of the image.
        column_titles: of the maps.
        rows: (title, maps (h, w) in 0..1, one per column).
        side: width of a picture in the grid, inches.
    """
    from matplotlib.patches import Rectangle

    plt = _pyplot()
    height, width = image.shape[:2]
    size = (side * (len(column_titles) + 1), side * height / width * len(rows) + 0.3)
    figure, axes = plt.subplots(
        len(rows), len(column_titles) + 1, figsize=size, squeeze=False, layout="constrained"
    )
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2) / 255
    for cells, (title, maps) in zip(axes, rows):
        for axis in cells:
            axis.set_xticks([])
            axis.set_yticks([])
        cells[0].imshow(image)
        cells[0].set_ylabel(title, fontsize=8)
        for axis, values in zip(cells[1:], maps):
            colours = plt.get_cmap("inferno")(np.clip(values, 0, 1))[..., :3]
            axis.imshow(0.35 * grey + 0.65 * colours)
        for axis in cells:
            for x0, y0, x1, y1 in boxes:
                frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="lime", lw=0.8)
                axis.add_patch(frame)
    for axis, title in zip(axes[0], ["ground truth", *column_titles]):
        axis.set_title(title, fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_panels(
    path: str, panels: Sequence[Tuple[str, Dict[str, List[Tuple[float, float]]]]], x_label: str
) -> None:
    """Write line plots side by side.

    Args:
        path: PNG to write.
        panels: (title, curve -> [(x, y), ...]).
        x_label: of all panels.
    """
    plt = _pyplot()
    size = (3.1 * len(panels), 2.9)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, curves) in zip(axes[0], panels):
        for name, points in curves.items():
            axis.plot(*zip(*points), label=name, marker="o", markersize=3)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(x_label, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
