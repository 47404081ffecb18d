"""Config keys that weight a distiller's terms, and their values for a given gradient ratio."""

import math
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterator, List, Mapping, Sequence, Tuple

from detectron2.config import CfgNode

from kd_d2.distillation import DISTILLER_REGISTRY, KDModel, build_distillers, build_tap

from .calibration import Pull
from .random_state import preserve_random_state

__all__ = ["KeyChange", "Suggestion", "power_of_two", "suggest", "weight_keys"]

# probed values of a key; a weight is what a term's factor is proportional to
_PROBES = (2.0, 3.0)


@dataclass(frozen=True)
class KeyChange:
    """A config key, its value now (as written in the config) and the suggested one."""

    key: str
    now: float
    suggested: float


@dataclass(frozen=True)
class Suggestion:
    """How a distiller reaches the target: all its terms change by the same factor, or, where
    ``targets`` are given, each by its own.

    Attributes:
        label: of the distiller.
        measured: mean ratio of all its terms together.
        group: where, "pyramid", or "parameters" if no pyramid is trained.
        factor: target (sum of the targets) / measured; NaN if nothing could be measured.
        changes: keys to set; empty if no key could be told.
        alone: term -> weight at which the term by itself has the target ratio.
        targets: term -> wanted ratio; empty: one for all of them together.
    """

    label: str
    measured: float
    group: str
    factor: float
    changes: Tuple[KeyChange, ...]
    alone: Dict[str, float]
    targets: Mapping[str, float] = field(default_factory=dict)


def weight_keys(cfg: CfgNode, model: KDModel) -> Dict[str, Dict[str, Dict[str, float]]]:
    """Return label -> config key -> term -> factor of the term per unit of the key.

    Found by trying: the distillers are built again with other values of every number in their
    node. It works for keys of any name, and for those whose -1 stands for a preset.
    """
    student = build_tap(model.student).keys(model.student)
    teacher = model.teacher.keys if model.teacher is not None else {}
    result = {}
    for entry in cfg.KD.DISTILLERS:
        name, _, label = entry.partition("/")
        node = (label or DISTILLER_REGISTRY.get(name).node_name()).upper()
        found: Dict[str, Dict[str, float]] = {}
        for key in _numbers(cfg.KD[node], f"KD.{node}"):
            weights = [_weights(cfg, entry, key, x, student, teacher) for x in _PROBES]
            if all(weights):
                low, high = weights
                terms = {
                    term: value / _PROBES[0]
                    for term, value in low.items()
                    if value and math.isclose(high.get(term, 0) / value, _PROBES[1] / _PROBES[0])
                }
                if terms:
                    found[key] = terms
        result[(label or name).lower()] = found
    return result


def _numbers(node: CfgNode, path: str) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode) and key != "SCHEDULE":
            yield from _numbers(value, f"{path}.{key}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{path}.{key}"


def _weights(cfg, entry, key, value, student, teacher) -> Dict[str, float]:
    """Weights of a distiller with one key changed; empty if it refuses the value."""
    cfg = cfg.clone()
    cfg.defrost()
    *parts, name = key.split(".")
    node = cfg
    for part in parts:
        node = node[part]
    node[name] = type(node[name])(value)
    cfg.KD.DISTILLERS = (entry,)
    try:
        with preserve_random_state():
            distillers, _ = build_distillers(cfg, student, teacher)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, IndexError):
        return {}
    (distiller,) = distillers.values()
    return dict(distiller.weights)


def power_of_two(value: float) -> float:
    """Return the power of two nearest to a positive ``value`` as a ratio: 3 -> 4, 2.8 -> 2."""
    return 2.0 ** round(math.log2(value))


def suggest(
    cfg: CfgNode,
    model: KDModel,
    pulls: Sequence[Pull],
    target: float,
    *,
    by_term: bool = False,
    rounded: Callable[[float], float] = float,
) -> List[Suggestion]:
    """Return how each distiller reaches ``target``, keeping the balance between its terms.

    Args:
        cfg: of the run.
        pulls: as :func:`kd_d2.engine.calibration.measure` returns them.
        target: gradient norm of a distiller relative to that of the detection losses.
        by_term: bring each term to the distiller's own ``target_ratios`` instead, where it has
            some.
        rounded: applied to the suggested values.

    Raises:
        ValueError: ``target`` is not positive.
    """
    if not target > 0 or not math.isfinite(target):
        raise ValueError(f"the target ratio must be positive, got {target}")
    by_name = {pull.name: pull for pull in pulls}
    group = "pyramid" if by_name["detection"].norms["pyramid"].max else "parameters"
    keys = weight_keys(cfg, model)

    def factor(name: str, wanted: float) -> float:
        measured = by_name[name].ratios[group].mean
        return wanted / measured if measured > 0 else math.nan

    result = []
    for label, distiller in model.distillers.items():
        names = {term: f"{label}/{term}" for term in distiller.terms}
        total = label if len(names) > 1 else next(iter(names.values()))
        weights = {term: weight for term, weight in distiller.weights.items() if weight}
        targets = {t: distiller.target_ratios[t] for t in weights if t in distiller.target_ratios}
        if by_term and targets:
            factors = {t: factor(names[t], wanted) for t, wanted in targets.items()}
            cover = _single_keys(keys[label], targets)
            whole = factor(total, sum(targets.values()))
        else:
            targets, whole = {}, factor(total, target)
            factors = {term: whole for term in weights}
            cover = _cover(keys[label], distiller.weights)
        changes = []
        for key, terms in cover:
            term = next(term for term in terms if term in factors)
            value = weights[term] / terms[term] * factors[term]
            if math.isfinite(value):
                changes.append(KeyChange(key, _value(cfg, key), rounded(value)))
        result.append(
            Suggestion(
                label=label,
                measured=by_name[total].ratios[group].mean,
                group=group,
                factor=whole,
                changes=tuple(changes),
                alone={t: w * factor(names[t], targets.get(t, target)) for t, w in weights.items()},
                targets=targets,
            )
        )
    return result


def _single_keys(
    keys: Mapping[str, Mapping[str, float]], terms: Mapping[str, float]
) -> List[Tuple[str, Mapping[str, float]]]:
    """Of each term the key that scales it and no other; terms without one are left out."""
    found = {next(iter(scaled)): key for key, scaled in keys.items() if len(scaled) == 1}
    return [(found[term], keys[found[term]]) for term in terms if term in found]


def _cover(
    keys: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]
) -> List[Tuple[str, Mapping[str, float]]]:
    """The fewest keys that together scale every term once; empty if there are none such."""
    left = {term for term, weight in weights.items() if weight}
    chosen = []
    for key, terms in sorted(keys.items(), key=lambda item: -len(item[1])):
        own = {term for term in terms if weights.get(term)}
        if own and own <= left:
            chosen.append((key, {term: terms[term] for term in own}))
            left -= own
    return [] if left else chosen


def _value(cfg: CfgNode, key: str) -> float:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg
