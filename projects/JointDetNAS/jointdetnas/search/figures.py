"""The paper's figures of a search, as pictures."""

import contextlib
from typing import Dict, Iterator, List, Mapping, Sequence, Tuple

from .analyses import Result, action_gains, matched_teachers, score_curves
from .results import Point, pareto_front

__all__ = [
    "draw_actions",
    "draw_allocation",
    "draw_capacity",
    "draw_epochs",
    "draw_pareto",
    "draw_scores",
    "draw_weights",
]


@contextlib.contextmanager
def _figure(path: str, rows: int, columns: int, size: Tuple[float, float]) -> Iterator[List]:
    """Axes to draw on, row by row; the picture is written at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    try:
        yield list(axes.flat)
        for axis in axes.flat:
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
    finally:
        plt.close(figure)


def _label(axis, title: str, x: str, y: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)


def draw_pareto(searches: Mapping[str, Sequence[Point]], path: str) -> None:
    """Fig. 9: AP against multiply-adds of the detector, all points and the front.

    Args:
        searches: title -> points.
        path: PNG to write.
    """
    with _figure(path, 1, 1, (7, 5)) as (axis,):
        for title, candidates in searches.items():
            line = axis.plot(
                [p.macs / 1e9 for p in candidates], [p.ap for p in candidates], ".", alpha=0.4
            )[0]
            front = pareto_front(candidates)
            axis.step(
                [p.macs / 1e9 for p in front],
                [p.ap for p in front],
                where="post",
                marker="o",
                color=line.get_color(),
                label=f"{title}: front",
            )
        _label(axis, "AP against complexity", "GMAC of the detector", "AP")


def draw_scores(searches: Mapping[str, Sequence[Result]], path: str) -> None:
    """Fig. 8: the score of every trial and the best one so far, at each resolution."""
    with _figure(path, 1, len(searches), (7 * len(searches), 5)) as axes:
        for axis, (title, found) in zip(axes, searches.items()):
            for size, curve in score_curves(found).items():
                numbers, scores, best = zip(*curve)
                line = axis.step(
                    numbers, best, where="post", label=f"{size[0]}x{size[1]}, best so far"
                )[0]
                axis.plot(numbers, scores, ".", color=line.get_color(), alpha=0.5)
            _label(axis, title, "trial", "score H")


def draw_actions(searches: Mapping[str, Sequence[Result]], path: str) -> None:
    """Fig. 6: gains of the student's actions over trials; their shares over generations."""
    with _figure(path, 2, len(searches), (7 * len(searches), 8)) as axes:
        for column, (title, found) in enumerate(searches.items()):
            top, bottom = axes[column], axes[len(searches) + column]
            gains = action_gains(found)
            for name, values in gains.cumulated.items():
                top.step(gains.trials, values, where="post", label=name)
            _label(top, title, "trial", "cumulated gain of score")
            generations = sorted(gains.beneficial)
            below = [0.0] * len(generations)
            for name in gains.cumulated:
                shares = [
                    100 * gains.beneficial[g][name] / sum(gains.beneficial[g].values())
                    for g in generations
                ]
                bottom.bar(generations, shares, bottom=below, label=name)
                below = [a + b for a, b in zip(below, shares)]
            _label(bottom, "", "generation of the pair", "beneficial actions, %")


def draw_capacity(searches: Mapping[str, Sequence[Result]], path: str) -> None:
    """Fig. 5: backbone parameters of the best pair's teacher, and of all teachers."""
    with _figure(path, 1, 2, (13, 5)) as (left, right):
        for title, found in searches.items():
            curve, everywhere = matched_teachers(found)
            if not curve:
                continue
            numbers, parameters = zip(*curve)
            left.step(numbers, [p / 1e6 for p in parameters], where="post", label=title)
            right.hist([p / 1e6 for p in everywhere], bins=20, alpha=0.5, label=title)
        _label(left, "teacher of the best pair", "trial", "backbone parameters, M")
        _label(right, "teachers of all trials", "backbone parameters, M", "trials")


def draw_allocation(pairs: Mapping[str, Tuple[Mapping[str, int], Mapping[str, int]]], path: str):
    """Fig. 7: multiply-adds by stage of the backbone, before and after the search.

    Args:
        pairs: title -> (before, after), each module -> multiply-adds.
        path: PNG to write.
    """
    with _figure(path, 1, len(pairs), (6 * len(pairs), 5)) as axes:
        for axis, (title, both) in zip(axes, pairs.items()):
            for offset, label, macs in zip((-0.2, 0.2), ("before", "after"), both):
                places = [i + offset for i in range(len(macs))]
                axis.bar(places, [m / 1e9 for m in macs.values()], width=0.4, label=label)
            axis.set_xticks(range(len(both[0])), list(both[0]))
            _label(axis, title, "", "GMAC")


def draw_weights(networks: Mapping[str, Mapping[str, Sequence[float]]], path: str) -> None:
    """Fig. 11: histograms of |gamma| of the backbone's batch norms, on common bins.

    Args:
        networks: title -> group ("inside blocks", "projection of stage 3") -> values.
        path: PNG to write.
    """
    largest = max(value for groups in networks.values() for v in groups.values() for value in v)
    with _figure(path, 1, len(networks), (6 * len(networks), 5)) as axes:
        for axis, (title, groups) in zip(axes, networks.items()):
            for group, values in groups.items():
                axis.hist(values, bins=50, range=(0, largest), histtype="step", label=group)
            axis.set_yscale("log")
            _label(axis, title, "|gamma|", "channels")


def draw_epochs(curves: Dict[str, Sequence[Tuple[float, float]]], path: str) -> None:
    """Fig. 4 and 10: AP against epochs of training.

    Args:
        curves: title -> (epochs, AP).
        path: PNG to write.
    """
    with _figure(path, 1, 1, (7, 5)) as (axis,):
        for title, curve in curves.items():
            epochs, aps = zip(*curve) if curve else ((), ())
            axis.plot(epochs, aps, marker="o", label=title)
        _label(axis, "AP against training", "epochs", "AP")
