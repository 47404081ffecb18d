"""A frozen teacher's bottom-up network, compiled by ``torch.compile``."""

from typing import Iterable

import torch
from torch import nn

__all__ = ["check_uncompiled", "compile_trunk"]


def _trunk(model: nn.Module) -> str:
    """Path of the bottom-up network: the largest part that is a function of one tensor."""
    return "backbone.bottom_up" if hasattr(model.backbone, "bottom_up") else "backbone"


def compile_trunk(model: nn.Module, backend: str) -> None:
    """Let the bottom-up network of ``model`` run compiled, in place.

    Only its ``forward`` is compiled, not the hooks around it, so that its output can be recorded as
    ever; shapes are dynamic, since images of a batch are padded to ever other sizes. The state
    dict stays as it is.

    Args:
        model: a detector with a ``backbone``, in eval mode.
        backend: of ``torch.compile``.

    Raises:
        ValueError: there is no such backend.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"KD.TEACHER.COMPILE is '{backend}'; it must be '' or one of {known}")
    trunk = model.get_submodule(_trunk(model))
    trunk.forward = torch.compile(trunk.forward, backend=backend, dynamic=True)


def check_uncompiled(model: nn.Module, keys: Iterable[str]) -> None:
    """See that no key asks for a module inside of the compiled network.

    Raises:
        ValueError: one does: what happens in there cannot be recorded.
    """
    inside = f"path:{_trunk(model)}."
    for key in keys:
        if key.startswith(inside):
            raise ValueError(
                f"'{key}' lies inside of the teacher's bottom-up network, which is compiled; set "
                "KD.TEACHER.COMPILE ''"
            )
