"""Training curves from the ``metrics.json`` files that Detectron2 writes."""

import json
from typing import Dict, List, Sequence, Tuple

__all__ = ["draw_curves", "read_metrics"]


def read_metrics(path: str) -> Dict[str, List[Tuple[int, float]]]:
    """Return scalar name -> [(iteration, value), ...] in order of iterations.

    A run that was killed and resumed has written some iterations twice; the later entry counts.
    """
    series: Dict[str, Dict[int, float]] = {}
    with open(path) as f:
        for line in f:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # last line of a run that was killed while writing it
            iteration = record.pop("iteration")
            for name, value in record.items():
                series.setdefault(name, {})[iteration] = value
    return {name: sorted(values.items()) for name, values in series.items()}


def detection_loss(series: Dict[str, List[Tuple[int, float]]]) -> List[Tuple[int, float]]:
    """Sum of the detector's own losses, without distillation terms."""
    totals: Dict[int, float] = {}
    for name, values in series.items():
        if name.startswith("loss_") and not name.startswith("loss_kd/"):
            for iteration, value in values:
                totals[iteration] = totals.get(iteration, 0.0) + value
    return sorted(totals.items())


def draw_curves(runs: Sequence[Tuple[str, str]], path: str, smoothing: int = 5) -> None:
    """Draw detection losses, distillation losses and AP of several runs beside each other.

    Args:
        runs: (title, path of its metrics.json).
        path: PNG to write.
        smoothing: number of neighbouring log entries that a loss is averaged over.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for title, metrics_file in runs:
        series = read_metrics(metrics_file)
        _plot(axes[0], detection_loss(series), title, smoothing)
        for name in sorted(series):
            if name.startswith("loss_kd/"):
                _plot(axes[1], series[name], f"{title}: {name[len('loss_kd/'):]}", smoothing)
        _plot(axes[2], series.get("bbox/AP", []), title, 1, marker="o")
    for axis, name in zip(axes, ("detection losses", "distillation losses", "validation AP")):
        axis.set_title(name)
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot(axis, values, label, smoothing, **style) -> None:
    if not values:
        return
    xs, ys = zip(*values)
    window = max(1, min(smoothing, len(ys)))
    smooth = [sum(ys[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(ys))]
    axis.plot(xs, smooth, label=label, **style)
