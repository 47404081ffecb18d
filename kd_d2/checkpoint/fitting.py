"""Loading of weights that must fit the model."""

from typing import Any, Dict, Iterable

from torch import nn

from kd_d2.checkpoint.checkpointer import KDCheckpointer

__all__ = ["load_weights"]


def load_weights(
    model: nn.Module, path: str, allow_unsafe: bool = False, optional: Iterable[str] = ()
) -> Dict[str, Any]:
    """Load a checkpoint that has to fit, and return what it holds beside the model.

    Args:
        model: is changed in place.
        path: of the checkpoint.
        allow_unsafe: KD.ALLOW_UNSAFE_LOAD.
        optional: paths of modules that the checkpoint need not have.

    Raises:
        ValueError: keys are missing, unexpected or of another shape.
        FileNotFoundError: there is no such file.
    """
    if not path:
        raise ValueError("the path of the student's checkpoint is empty")
    checkpointer = KDCheckpointer(model, allow_unsafe=allow_unsafe)
    extra = checkpointer.load(path)
    report = checkpointer.last_report.without(optional)
    if not report.ok:
        raise ValueError(f"{path} does not fit the student of --config-file:\n{report.format()}")
    return extra
