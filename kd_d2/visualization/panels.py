"""Line plots of several quantities beside each other, one curve per run in each."""

from typing import Mapping, Sequence, Tuple

__all__ = ["Panel", "draw_panels"]

# title, run -> values at the positions of the x axis
Panel = Tuple[str, Mapping[str, Sequence[float]]]


def draw_panels(
    panels: Sequence[Panel],
    xs: Sequence[float],
    path: str,
    xlabel: str,
    ylabel: str,
    columns: int = 3,
) -> None:
    """Write a grid of line plots, each with its own scale, and one legend for all.

    Args:
        panels: in reading order, all with the same runs.
        xs: positions that all curves share.
        path: PNG to write.
        xlabel: below the lowest panels.
        ylabel: left of the leftmost panels.
        columns: panels beside each other.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.6 * columns, 2.8 * rows), squeeze=False, layout="constrained"
    )
    for axis, (title, curves) in zip(axes.flat, panels):
        for run, values in curves.items():
            axis.plot(xs, values, marker=".", label=run)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(xlabel)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)
    plt.close(figure)
