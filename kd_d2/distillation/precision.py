"""Numerical precision of a frozen teacher, apart from that of the student beside it."""

import contextlib
from typing import Any, ContextManager

import torch

__all__ = ["PRECISIONS", "Precision", "widened"]

# KD.TEACHER.DTYPE -> type of its convolutions and matrix products; "": that of the student's step
PRECISIONS = {
    "": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Precision:
    """Runs a teacher in a precision of its own and returns what the student's step expects.

    Weights stay as they are; ``torch.autocast`` casts them where they are used, and keeps in
    float32 what needs it (norms, softmax).
    """

    def __init__(self, name: str = ""):
        """
        Args:
            name: a key of :data:`PRECISIONS`.

        Raises:
            ValueError: there is no such precision.
        """
        if name not in PRECISIONS:
            known = ", ".join(f"'{key}'" for key in PRECISIONS)
            raise ValueError(f"KD.TEACHER.DTYPE is '{name}'; it must be one of {known}")
        self._dtype = PRECISIONS[name]

    def __call__(self, device: torch.device) -> ContextManager:
        """Return a context in which the teacher runs on ``device``."""
        if self._dtype is None:
            return contextlib.nullcontext()
        reduced = self._dtype != torch.float32
        # no cache: it holds only what requires gradients, and there are none
        return torch.autocast(
            device.type, self._dtype if reduced else None, enabled=reduced, cache_enabled=False
        )

    def returned(self, value: Any, device: torch.device) -> Any:
        """Return ``value``, :func:`widened` where this teacher has a precision of its own.

        In a step that is itself under autocast they stay as they are: its operators accept them,
        and its losses cast.
        """
        if self._dtype is None or torch.is_autocast_enabled(device.type):
            return value
        return widened(value)


def widened(value: Any) -> Any:
    """Return ``value`` with tensors of reduced precision in float32.

    Lists, tuples and dicts are followed, other objects are left alone.
    """
    if isinstance(value, torch.Tensor):
        reduced = value.dtype in (torch.bfloat16, torch.float16)
        return value.float() if reduced else value
    if type(value) in (list, tuple):
        return type(value)(widened(item) for item in value)
    if type(value) is dict:
        return {key: widened(item) for key, item in value.items()}
    return value
