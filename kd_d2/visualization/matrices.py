"""Heat maps of square matrices side by side."""

from typing import Sequence, Tuple

import numpy as np

__all__ = ["draw_matrices"]

# more labels cannot be read
_MOST_LABELS = 30


def draw_matrices(
    panels: Sequence[Tuple[str, np.ndarray]], path: str, names: Sequence[str] = (), label: str = ""
) -> None:
    """Draw matrices with non-negative entries in one common scale.

    Args:
        panels: (title, (C, C)) of each panel, beside each other.
        path: PNG to write.
        names: of rows and columns; left out where there are more than 30.
        label: what the colours mean.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (3.6 * len(panels) + 0.8, 3.8)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    highest = max(float(np.max(matrix)) for _, matrix in panels) or 1.0
    for axis, (title, matrix) in zip(axes[0], panels):
        image = axis.imshow(matrix, vmin=0, vmax=highest, cmap="magma")
        axis.set_title(title, fontsize=9)
        if 0 < len(names) <= _MOST_LABELS:
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
            axis.set_yticks(range(len(names)), names, fontsize=6)
    figure.colorbar(image, ax=axes[0].tolist(), label=label)
    figure.savefig(path, dpi=100)
    plt.close(figure)
