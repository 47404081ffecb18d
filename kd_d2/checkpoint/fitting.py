"""Loading of weights that must fit the model."""

from typing import Any, Dict

from torch import nn

from kd_d2.checkpoint.checkpointer import KDCheckpointer

__all__ = ["load_weights"]


def load_weights(model: nn.Module, path: str, allow_unsafe: bool = False) -> Dict[str, Any]:
    """Load a checkpoint that has to fit, and return what it holds beside the model.

    Raises:
        ValueError: keys are missing, unexpected or of another shape.
        FileNotFoundError: there is no such file.
    """
    if not path:
        raise ValueError("the path of the student's checkpoint is empty")
    checkpointer = KDCheckpointer(model, allow_unsafe=allow_unsafe)
    extra = checkpointer.load(path)
    if not checkpointer.last_report.ok:
        raise ValueError(
            f"{path} does not fit the student of --config-file:\n"
            f"{checkpointer.last_report.format()}"
        )
    return extra
