"""The part of pickle that model-zoo files need: arrays, strings, numbers and containers.

Detectron2's and Caffe2's zoo files are pickles of dicts of numpy arrays. Loading them with
``pickle.load`` runs whatever program the file contains. Here, the few names such files refer to
are bound to objects of this module; every other name is refused. Not even numpy's own functions
are called: the state of a pickled dtype or array can be forged such that numpy reads foreign
memory, so arrays are rebuilt with ``numpy.frombuffer`` from a checked type, shape and length.
"""

import math
import pickle
import re
from collections import OrderedDict
from typing import Any, BinaryIO, Callable, Dict, Tuple

import numpy as np

__all__ = ["ForbiddenGlobal", "restricted_load"]


class ForbiddenGlobal(Exception):
    """A pickle refers to something that is not on the list of permitted names.

    Args:
        name: dotted name that the file asked for.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def restricted_load(file: BinaryIO) -> Any:
    """The object pickled in ``file``, made of containers, scalars and numpy arrays only.

    Strings of Python 2 pickles are decoded as latin1, as Detectron2 does.

    Args:
        file: binary file object.

    Returns:
        None, bool, int, float, str, bytes, numpy scalars and arrays (types b, i, u, f, c, S, U),
        in any nesting of list, tuple, dict, OrderedDict, set and frozenset.

    Raises:
        ForbiddenGlobal: the file needs more than that.
        Exception: of many types, if the file is truncated or is no pickle.
    """
    return _resolve(_Unpickler(file, encoding="latin1").load(), {})


class _Dtype:
    """Stands in for a ``numpy.dtype`` while a file is read."""

    __slots__ = ("spec",)

    def __init__(self, spec: str) -> None:
        if not re.fullmatch(r"[<>|=]?[biufcSU]\d{0,9}", spec):
            raise ForbiddenGlobal(f"numpy.dtype({spec!r})")
        self.spec = spec

    def __setstate__(self, state: Tuple) -> None:
        _, order, sub_array, names, fields = state[:5]
        if sub_array or names or fields or order not in ("<", ">", "|", "="):
            raise ForbiddenGlobal("numpy.dtype with fields")
        self.spec = order + self.spec.lstrip("<>|=")

    def build(self) -> np.dtype:
        return np.dtype(self.spec)


class _Array:
    """Stands in for a ``numpy.ndarray`` between its two pickle instructions."""

    __slots__ = ("value",)

    def __setstate__(self, state: Tuple) -> None:
        _, shape, dtype, fortran_order, data = state
        self.value = _array(data, dtype, shape, "F" if fortran_order else "C")


def _array(data: Any, dtype: Any, shape: Tuple[int, ...], order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise ForbiddenGlobal("numpy.ndarray of a type that is not a plain number or string")
    dtype = dtype.build()
    data = data.encode("latin1") if isinstance(data, str) else bytes(data)
    shape = (shape,) if isinstance(shape, int) else shape
    if any(side < 0 for side in shape) or len(data) != math.prod(shape) * dtype.itemsize:
        raise pickle.UnpicklingError(
            f"an array of shape {shape} and type {dtype} cannot have {len(data)} bytes"
        )
    # A copy: what frombuffer returns is read-only.
    return np.frombuffer(data, dtype).copy().reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # Pickle protocols 0 to 2 write bytes as latin1 text and a call of this function.
    if encoding not in ("latin1", "latin-1"):
        raise ForbiddenGlobal(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _empty_or_copy(kind: Callable) -> Callable:
    def build(*args: Any) -> Any:
        # bytes(n) with an integer would allocate n bytes.
        if len(args) > 1 or (args and isinstance(args[0], int)):
            raise pickle.UnpicklingError(f"{kind.__name__} called with {len(args)} arguments")
        return kind(*args)

    return build


class _Constructor:
    """Callable without attributes: a pickle can set attributes of what it has been handed."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ForbiddenGlobal(f"assignment to {name}")

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def _scalar(dtype: _Dtype, data: Any) -> np.generic:
    return _array(data, dtype, (1,), "C")[0]


def _dtype(spec: Any, align: Any = False, copy: Any = False) -> _Dtype:
    return _Dtype(spec.decode("latin1") if isinstance(spec, bytes) else str(spec))


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> _Array:
    return _Array()


def _frombuffer(data: Any, dtype: _Dtype, shape: Any, order: str) -> np.ndarray:
    # Pickle protocol 5 writes arrays as one call.
    return _array(data, dtype, shape, order)


def _permitted() -> Dict[Tuple[str, str], Any]:
    table: Dict[Tuple[str, str], Any] = {
        ("collections", "OrderedDict"): _Constructor(OrderedDict),
        ("_codecs", "encode"): _Constructor(_encode),
        ("numpy", "dtype"): _Constructor(_dtype),
        ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
    }
    # Lists, dicts, strings and numbers are instructions of pickle and need no name.
    for kind in (bytes, bytearray, set, frozenset):
        table["builtins", kind.__name__] = _Constructor(_empty_or_copy(kind))
    # numpy 2 renamed numpy.core to numpy._core; files of either come by.
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = _Constructor(_reconstruct)
        table[f"{core}.multiarray", "scalar"] = _Constructor(_scalar)
        table[f"{core}.numeric", "_frombuffer"] = _Constructor(_frombuffer)
    return table


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._table = _permitted()

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # its name in Python 2
        try:
            return self._table[module, name]
        except KeyError:
            raise ForbiddenGlobal(f"{module}.{name}") from None


def _resolve(value: Any, seen: Dict[int, Tuple[Any, Any]]) -> Any:
    """``value`` with every stand-in replaced; containers are changed in place where they can be."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, _Dtype):
        return value.build()
    if isinstance(value, _Constructor):
        raise ForbiddenGlobal("a function or class as data")
    if id(value) in seen:
        return seen[id(value)][1]
    # The original is kept beside the result, so that its id is not given to another object.
    if isinstance(value, dict):
        seen[id(value)] = (value, value)
        for key in list(value):
            value[key] = _resolve(value[key], seen)
    elif isinstance(value, list):
        seen[id(value)] = (value, value)
        value[:] = [_resolve(entry, seen) for entry in value]
    elif isinstance(value, tuple):
        resolved = tuple(_resolve(entry, seen) for entry in value)
        seen[id(value)] = (value, resolved)
        return resolved
    return value
