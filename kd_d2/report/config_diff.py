"""Config keys in which runs differ."""

from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

__all__ = ["ABSENT", "Difference", "differences", "flatten", "group_of"]

# where a run was written says nothing about it
LEFT_OUT = ("OUTPUT_DIR", "VERSION")


class _Absent:
    def __repr__(self) -> str:
        return "not in this config"


ABSENT = _Absent()


class Difference(NamedTuple):
    """A key and its value in every config; :data:`ABSENT` where it has none."""

    key: str
    values: Tuple[Any, ...]


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """Dotted keys and values of a config as YAML holds it; an empty node is a value."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(configs: Sequence[Mapping[str, Any]]) -> List[Difference]:
    """Keys whose values are not equal in all configs, group by group; never :data:`LEFT_OUT`.

    YAML has no tuples, so lists and tuples of equal values are equal, and 1 equals 1.0.
    """
    flat: List[Dict[str, Any]] = [dict(flatten(config)) for config in configs]
    result = []
    for key in sorted(set().union(*flat), key=lambda key: (group_of(key), key)):
        values = tuple(config.get(key, ABSENT) for config in flat)
        if key not in LEFT_OUT and any(_plain(v) != _plain(values[0]) for v in values):
            result.append(Difference(key, values))
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    # Python's True equals 1
    return (bool, value) if isinstance(value, bool) else value


def group_of(key: str) -> str:
    """Node that a key is shown under: two levels of KD and MODEL, one of the others."""
    parts = key.split(".")
    depth = 2 if parts[0] in ("KD", "MODEL") and len(parts) > 2 else 1
    return ".".join(parts[:depth])
