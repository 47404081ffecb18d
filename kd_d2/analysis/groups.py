"""The parts of a detector that a report lists: backbone, pyramid, heads, and the rest."""

from typing import Dict, List, Mapping, NamedTuple

from torch import nn

__all__ = ["REST", "Group", "by_group", "module_groups", "parameters_by_group"]

REST = "rest"


class Group(NamedTuple):
    """A module, or what is left of it without one of its own modules.

    Attributes:
        name: for the report.
        path: of the module.
        without: path of the module inside that is a group of its own; "" if there is none.
    """

    name: str
    path: str
    without: str = ""


def module_groups(model: nn.Module) -> List[Group]:
    """Return the children of a detector that have parameters, in order.

    A backbone with a ``bottom_up`` is two: ``backbone.bottom_up`` and the pyramid above it,
    ``backbone.fpn``. What the model does by itself (normalisation, choice and decoding of boxes,
    NMS) is no module's: the rest.
    """
    groups = []
    for name, child in model.named_children():
        if next(child.parameters(), None) is None:
            continue
        if isinstance(getattr(child, "bottom_up", None), nn.Module):
            inner = f"{name}.bottom_up"
            groups += [Group(inner, inner), Group(f"{name}.fpn", name, without=inner)]
        else:
            groups.append(Group(name, name))
    return groups


def by_group(groups: List[Group], values: Mapping[str, float], total: float) -> Dict[str, float]:
    """Return a quantity by name of the group; "rest" is what is left of the total.

    Args:
        groups: of :func:`module_groups`.
        values: path -> quantity of the module with everything in it; what is absent counts 0.
        total: of the whole model.
    """
    result = {
        group.name: values.get(group.path, 0)
        - (values.get(group.without, 0) if group.without else 0)
        for group in groups
    }
    return {**result, REST: total - sum(result.values())}


def parameters_by_group(model: nn.Module, groups: List[Group]) -> Dict[str, int]:
    """Return the number of parameters by group; one that two groups share counts in the first."""
    counts = {group.name: 0 for group in groups}
    # the inner module before the one that it is a part of
    owners = sorted(groups, key=lambda group: -group.path.count("."))
    total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        for group in owners:
            if name.startswith(f"{group.path}."):
                counts[group.name] += parameter.numel()
                break
    return {**counts, REST: total - sum(counts.values())}
