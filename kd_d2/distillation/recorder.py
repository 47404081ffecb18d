"""Capture of what crosses module boundaries during one forward pass.

Detectron2's training forwards return losses only. :class:`ModuleRecorder` reads the tensors in
between without touching the model: its hooks exist only inside the ``with`` block.
"""

import difflib
from typing import Any, Iterable, Iterator, List, Tuple

import torch
from torch import nn

__all__ = ["CallReader", "ModuleRecorder", "RecordedCall", "near_matches"]


def near_matches(name: str, known: Iterable[str], count: int = 5) -> str:
    """Return a comma-separated list of the entries of ``known`` that resemble ``name``."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.4)
    return ", ".join(close or known[:count])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class RecordedCall:
    """Inputs and output of one call of a module.

    Reading either raises ``RuntimeError`` if a tensor in it was modified in place since the call:
    it would no longer be what the module received or returned.
    """

    def __init__(self, path: str, inputs: Tuple, output: Any):
        self._path = path
        self._inputs = inputs
        self._output = output
        self._input_versions = [t._version for t in _tensors(inputs)]
        self._output_versions = [t._version for t in _tensors(output)]

    @property
    def inputs(self) -> Tuple:
        self._check("an input", self._inputs, self._input_versions)
        return self._inputs

    @property
    def output(self) -> Any:
        self._check("the output", self._output, self._output_versions)
        return self._output

    def _check(self, what: str, value: Any, versions: List[int]) -> None:
        for tensor, version in zip(_tensors(value), versions):
            if tensor._version != version:
                raise RuntimeError(
                    f"{what} of module '{self._path}' (shape {tuple(tensor.shape)}) was modified "
                    "in place after it was recorded; tap a module whose result is not followed "
                    "by an in-place operation"
                )


class CallReader:
    """Ways to read recorded calls, for whatever keeps some."""

    def calls(self, path: str) -> List[RecordedCall]:
        """Return all calls of module ``path``, oldest first."""
        raise NotImplementedError

    def single(self, path: str) -> RecordedCall:
        """Return the only call of ``path``; raise ``RuntimeError`` unless it is exactly one."""
        return self.per_level(path, 1)[0]

    def per_level(self, path: str, num_levels: int) -> List[RecordedCall]:
        """Return the calls of a module shared by ``num_levels`` levels, one a level.

        Raises:
            RuntimeError: the module was called another number of times.
        """
        calls = self.calls(path)
        if len(calls) != num_levels:
            raise RuntimeError(
                f"module '{path}' was called {len(calls)} times, expected {num_levels}"
            )
        return calls


class ModuleRecorder(CallReader):
    """Records every call of chosen sub-modules, in order, while its ``with`` block is open.

    A module that is called several times, like a head shared by pyramid levels, has several
    calls. The hooks are removed when the block is left, also by an exception; the records stay
    readable afterwards until the recorder is entered again.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        """
        Args:
            model: the module that is going to be called.
            paths: dotted names of its sub-modules, as in ``model.named_modules()``.

        Raises:
            ValueError: a path does not exist; the message lists similar ones.
        """
        modules = dict(model.named_modules())
        self._modules = {}
        for path in sorted(set(paths)):
            if path not in modules:
                raise ValueError(
                    f"{type(model).__name__} has no module '{path}'; "
                    f"similar: {near_matches(path, (m for m in modules if m))}"
                )
            self._modules[path] = modules[path]
        self._calls = {path: [] for path in self._modules}
        self._handles = []

    def __enter__(self) -> "ModuleRecorder":
        if self._handles:
            raise RuntimeError("this recorder is already recording")
        self._calls = {path: [] for path in self._modules}
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(path)))
        return self

    def __exit__(self, *exc_info) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, path: str):
        calls = self._calls[path]

        def record(module, inputs, output):
            calls.append(RecordedCall(path, inputs, output))

        return record

    def calls(self, path: str) -> List[RecordedCall]:
        """Return all calls of ``path``, oldest first (possibly none)."""
        if path not in self._calls:
            raise ValueError(
                f"module '{path}' is not recorded; recorded: {', '.join(self._calls) or 'none'}"
            )
        return list(self._calls[path])
