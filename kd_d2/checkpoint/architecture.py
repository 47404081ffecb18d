"""The entry ``arch`` of a checkpoint: what network the weights beside it belong to.

Some networks have an architecture that is itself a result, and no config says it for sure (a
pruned backbone). Detectron2 skips tensors of another shape with a warning, so with a wrong config
it would evaluate random weights. A sub-module of such a network has two methods:

- ``architecture_entry(model)`` returns a dict of numbers, strings and lists, which every checkpoint
  of ``model`` then holds;
- ``check_architecture(model, entry)`` compares the entry of a file (None if it has none) with
  ``model`` and raises ``ValueError`` if they differ. Nothing has been loaded at that moment.
"""

from typing import Any, Dict, Mapping, Optional, Tuple

from torch import nn

from kd_d2.checkpoint.report import KeyReport, below

__all__ = ["ENTRY", "architecture_entry", "check_entry", "check_fit"]

ENTRY = "arch"


def _described(model: nn.Module) -> Optional[Tuple[str, nn.Module]]:
    """Path and module of the sub-module that describes ``model``; None if there is none."""
    for name, module in model.named_modules():
        if hasattr(module, "architecture_entry"):
            return name, module
    return None


def architecture_entry(model: nn.Module) -> Dict[str, Any]:
    """``{"arch": ...}`` for a model that describes itself, else nothing."""
    found = _described(model)
    return {ENTRY: found[1].architecture_entry(model)} if found else {}


def check_entry(model: nn.Module, data: Mapping[str, Any], path: str) -> None:
    """Compare the entry of the checkpoint ``data`` with a model that describes itself.

    Raises:
        ValueError: they differ; the message names ``path`` and the difference.
    """
    found = _described(model)
    if found is None:
        return
    try:
        found[1].check_architecture(model, data.get(ENTRY))
    except ValueError as error:
        raise ValueError(f"{path} does not belong to the model of the config: {error}") from None


def check_fit(model: nn.Module, report: KeyReport, has_entry: bool, path: str) -> None:
    """Refuse weights of another shape, and missing ones, for a model that describes itself.

    Only the child that holds the describing module counts, the backbone. Keys that the file lacks
    are no mistake if it has no entry: weights of a classifier, say.

    Args:
        report: what loading found.
        has_entry: the file has an entry ``arch``.

    Raises:
        ValueError: keys have another shape or are missing.
    """
    found = _described(model)
    if found is None:
        return
    part = found[0].split(".")[0]
    keys = [part] if part else []

    def concerned(key: str) -> bool:
        return not keys or below(key, keys)

    misfit = KeyReport(
        missing=[key for key in report.missing if has_entry and concerned(key)],
        mismatched=[entry for entry in report.mismatched if concerned(entry[0])],
    )
    if not misfit.ok:
        raise ValueError(
            f"{path} does not fit the {part or 'model'} of the config, which would keep random "
            f"weights:\n{misfit.format()}"
        )
