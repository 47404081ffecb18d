"""Numbers behind the paper's figures, from the results of a search alone."""

from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from ..actions import STUDENT_ACTIONS

__all__ = [
    "ActionGains",
    "action_gains",
    "epochs_curve",
    "lineage",
    "matched_teachers",
    "pair_generations",
    "score_curves",
]

Result = Dict[str, Any]


def pair_generations(found: Sequence[Result]) -> Dict[int, int]:
    """Trial -> number of improvements on the way to its pair (Fig. 6).

    One more than that of the parent if its score is better, else the same; 0 without a parent.
    """
    scores = {result["number"]: result["score"] for result in found}
    generations: Dict[int, int] = {}
    for result in sorted(found, key=lambda r: r["number"]):
        parent = result["parent"]
        better = parent is not None and result["score"] > scores[parent]
        generations[result["number"]] = generations.get(parent, 0) + int(better)
    return generations


class ActionGains(NamedTuple):
    """Fig. 6.

    Args:
        trials: numbers of all trials.
        cumulated: action -> sum of max(score - parent's score, 0) up to each of ``trials``.
        beneficial: pair generation -> action -> number of its beneficial uses that led there.
    """

    trials: List[int]
    cumulated: Dict[str, List[float]]
    beneficial: Dict[int, Dict[str, int]]


def action_gains(found: Sequence[Result]) -> ActionGains:
    """What the student's actions brought, over trials and over generations."""
    scores = {result["number"]: result["score"] for result in found}
    generations = pair_generations(found)
    names = [name for name, _ in STUDENT_ACTIONS]
    sums = {name: 0.0 for name in names}
    cumulated: Dict[str, List[float]] = {name: [] for name in names}
    beneficial: Dict[int, Dict[str, int]] = {}
    ordered = sorted(found, key=lambda r: r["number"])
    for result in ordered:
        name = result["change"]
        if name in sums:
            gain = result["score"] - scores[result["parent"]]
            sums[name] += max(gain, 0.0)
            if gain > 0:
                counts = beneficial.setdefault(
                    generations[result["number"]], dict.fromkeys(names, 0)
                )
                counts[name] += 1
        for key in names:
            cumulated[key].append(sums[key])
    return ActionGains([r["number"] for r in ordered], cumulated, beneficial)


def matched_teachers(found: Sequence[Result]) -> Tuple[List[Tuple[int, int]], List[int]]:
    """Fig. 5: backbone parameters of teachers.

    Returns:
        (trial, those of the best pair's teacher after it) for every trial, and those of all trials.
    """
    best, curve, everywhere = None, [], []
    for result in sorted(found, key=lambda r: r["number"]):
        if result["teacher_parameters"] is None:
            continue
        if best is None or result["score"] > best["score"]:
            best = result
        curve.append((result["number"], best["teacher_parameters"]))
        everywhere.append(result["teacher_parameters"])
    return curve, everywhere


def score_curves(
    found: Sequence[Result],
) -> Dict[Tuple[int, int], List[Tuple[int, float, float]]]:
    """Fig. 8: resolution -> (trial, its score, best score up to it), by trials."""
    curves: Dict[Tuple[int, int], List[Tuple[int, float, float]]] = {}
    for result in sorted(found, key=lambda r: r["number"]):
        for entry in result["sizes"]:
            curve = curves.setdefault(tuple(entry["size"]), [])
            best = max(entry["score"], curve[-1][2]) if curve else entry["score"]
            curve.append((result["number"], entry["score"], best))
    return curves


def lineage(found: Sequence[Result], number: int) -> List[Result]:
    """The trials that a student's weights went through, the base first."""
    by_number = {result["number"]: result for result in found}
    result = []
    current = number
    while current is not None:
        result.append(by_number[current])
        current = by_number[current]["parent"]
    return result[::-1]


def epochs_curve(found: Sequence[Result]) -> List[Tuple[float, float]]:
    """Fig. 4 and 10: (epochs that a student was trained for, best AP among such students).

    Epochs are those of its whole lineage within the search, AP that at the largest resolution.
    """
    best: Dict[float, float] = {}
    for result in found:
        epochs = round(sum(r["epochs"] for r in lineage(found, result["number"])), 6)
        entry = max(result["sizes"], key=lambda e: e["size"][0] * e["size"][1])
        best[epochs] = max(entry["AP"], best.get(epochs, entry["AP"]))
    return sorted(best.items())
