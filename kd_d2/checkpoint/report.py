"""Which keys of a checkpoint fit a model, as data and as text."""

from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Tuple

from torch import nn

__all__ = ["KeyReport", "compare"]

_Mismatch = Tuple[str, Tuple[int, ...], Tuple[int, ...]]


@dataclass
class KeyReport:
    """Differences between the keys of a checkpoint and those of a model.

    Args:
        missing: keys of the model that the checkpoint lacks.
        unexpected: keys of the checkpoint that the model lacks.
        mismatched: (key, shape in the checkpoint, shape in the model) of keys that both have.
    """

    missing: List[str] = field(default_factory=list)
    unexpected: List[str] = field(default_factory=list)
    mismatched: List[_Mismatch] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if every key of one side is on the other, with the same shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def without(self, prefixes: Iterable[str]) -> "KeyReport":
        """This report without the keys of the modules named in ``prefixes``.

        Args:
            prefixes: module paths; "head" covers "head.weight", not "head2.weight".
        """
        prefixes = tuple(prefixes)
        return KeyReport(
            [key for key in self.missing if not below(key, prefixes)],
            [key for key in self.unexpected if not below(key, prefixes)],
            [entry for entry in self.mismatched if not below(entry[0], prefixes)],
        )

    def format(self) -> str:
        """All differences, one line per module, under a heading per kind; one line if there are
        none."""
        if self.ok:
            return "All keys match."
        lines = []
        if self.missing:
            lines.append(f"{len(self.missing)} keys of the model are not in the checkpoint:")
            lines += _grouped(self.missing)
        if self.unexpected:
            lines.append(f"{len(self.unexpected)} keys of the checkpoint are not in the model:")
            lines += _grouped(self.unexpected)
        if self.mismatched:
            lines.append(f"{len(self.mismatched)} keys have another shape:")
            lines += [
                f"  {name}: {tuple(theirs)} in the checkpoint, {tuple(ours)} in the model"
                for name, theirs, ours in sorted(self.mismatched)
            ]
        return "\n".join(lines)


def compare(state_dict: Mapping[str, Any], module: nn.Module) -> KeyReport:
    """Differences between ``state_dict`` and the state dict of ``module``; nothing is loaded.

    Detectron2's exemptions apply, see :func:`is_exempt`.

    Args:
        state_dict: tensors or numpy arrays by key.
        module: the model.

    Returns:
        report with sorted keys.
    """
    ours: Dict[str, Any] = module.state_dict()
    return KeyReport(
        sorted(key for key in ours if key not in state_dict and not is_exempt(key, module)),
        sorted(key for key in state_dict if key not in ours and not is_exempt(key, module)),
        sorted(
            (key, tuple(state_dict[key].shape), tuple(ours[key].shape))
            for key in ours
            if key in state_dict and tuple(state_dict[key].shape) != tuple(ours[key].shape)
        ),
    )


def is_exempt(key: str, module: nn.Module) -> bool:
    """True for keys whose presence says nothing about the weights.

    The model's own pixel statistics come from its config, and older Detectron2 stored them and the
    cell anchors in checkpoints while current ones do not: files of the model zoo have them.

    Args:
        key: name in a state dict.
        module: the model that is loaded.
    """
    if "anchor_generator.cell_anchors" in key:
        return True
    return key in ("pixel_mean", "pixel_std") and key in dict(module.named_buffers(recurse=False))


def below(key: str, prefixes: Iterable[str]) -> bool:
    """True if ``key`` is, or is inside, one of the modules named in ``prefixes``."""
    return any(
        key == prefix.rstrip(".") or key.startswith(prefix.rstrip(".") + ".")
        for prefix in prefixes
        if prefix
    )


def _grouped(keys: Iterable[str]) -> List[str]:
    groups: Dict[str, List[str]] = {}
    for key in sorted(keys):
        module, _, name = key.rpartition(".")
        groups.setdefault(module, []).append(name)
    return [
        f"  {module}: {', '.join(names)}" if module else f"  {', '.join(names)}"
        for module, names in groups.items()
    ]
