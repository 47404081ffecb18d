"""Bar charts of a quantity that several methods are compared by."""

from typing import Sequence, Tuple

__all__ = ["Bar", "draw_bars"]

# label, values of the single runs
Bar = Tuple[str, Sequence[float]]


def draw_bars(panels: Sequence[Tuple[str, Sequence[Bar]]], path: str, ylabel: str = "AP") -> None:
    """Draw the means of several runs as bars, standard deviations and the runs themselves on top.

    Args:
        panels: (title, bars) of each panel, beside each other.
        path: PNG to write.
        ylabel: name of the quantity.
    """
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False)
    for axis, (title, bars) in zip(axes[0], panels):
        for x, (_, values) in enumerate(bars):
            spread = np.std(values, ddof=1) if len(values) > 1 else None
            axis.bar(x, np.mean(values), yerr=spread, capsize=4, color=f"C{x % 10}", alpha=0.75)
            axis.plot([x] * len(values), values, "k.", markersize=5)
        axis.set_xticks(range(len(bars)), [label for label, _ in bars], rotation=25, ha="right")
        axis.set_title(title)
        axis.set_ylabel(ylabel)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
