"""Registries of the blocks that a loss term is made of, and how a config names them."""

import ast
import inspect
from typing import Any, Dict

from detectron2.utils.registry import Registry

from kd_d2.distillation.recorder import near_matches

__all__ = [
    "KD_ADAPTERS",
    "KD_DISTANCES",
    "KD_NORMALISERS",
    "KD_REGIONS",
    "KD_SOURCES",
    "KD_TRANSFORMS",
    "build_block",
]

KD_SOURCES = Registry("KD_SOURCES")
KD_SOURCES.__doc__ = "What of student and teacher is compared: see :class:`Source`."
KD_REGIONS = Registry("KD_REGIONS")
KD_REGIONS.__doc__ = "Where it is compared: see :class:`Region`."
KD_ADAPTERS = Registry("KD_ADAPTERS")
KD_ADAPTERS.__doc__ = "Trainable maps from the student's width to the teacher's: see `Adapter`."
KD_TRANSFORMS = Registry("KD_TRANSFORMS")
KD_TRANSFORMS.__doc__ = "What both sides pass before they are compared: `Pair -> Pair`."
KD_DISTANCES = Registry("KD_DISTANCES")
KD_DISTANCES.__doc__ = "How they are compared: see :class:`Distance`."
KD_NORMALISERS = Registry("KD_NORMALISERS")
KD_NORMALISERS.__doc__ = "What the weighted sum is divided by: see :class:`Normaliser`."


def build_block(registry: Registry, expression: str, where: str) -> Any:
    """Return the block that a config value describes, e.g. ``NearAnchor(0.5, scope="all")``.

    The expression is a call of a registered name with literal arguments or further blocks of the
    same registry, as in ``Complement(GTCells(levels="fpn"))``; a bare name is a call without
    arguments. Nothing is evaluated as a program.

    Args:
        registry: one of this module's.
        expression: of the form above.
        where: config key, for messages.

    Raises:
        ValueError: not of that form, unknown name or argument, or a value that the block refuses.
    """
    if not isinstance(expression, str):
        raise ValueError(f"{where}: {expression!r} is not of the form Name(key=value)")
    try:
        node = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{where}: '{expression}' is not of the form Name(key=value)") from error
    return _build(registry, node, expression, where)


def _build(registry: Registry, node: ast.expr, expression: str, where: str) -> Any:
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(f"{where}: '{expression}' is not of the form Name(key=value)")
    name = node.func.id
    known = [known_name for known_name, _ in registry]
    if name not in known:
        raise ValueError(
            f"{where}: '{name}' is not registered in {registry._name}; known: "
            f"{', '.join(sorted(known))}; similar: {near_matches(name, known)}. Text needs quotes"
        )
    cls = registry.get(name)
    args = [_value(registry, arg, expression, where) for arg in node.args]
    kwargs: Dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"{where}: '**' cannot be used in '{expression}'")
        kwargs[keyword.arg] = _value(registry, keyword.value, expression, where)
    try:
        inspect.signature(cls).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"{where}: '{expression}': {error}; {name} takes {inspect.signature(cls)}"
        ) from None
    try:
        return cls(*args, **kwargs)
    except (TypeError, ValueError) as error:  # a value of another type, or one that is refused
        raise ValueError(f"{where}: '{expression}': {error}") from error


def _value(registry: Registry, node: ast.expr, expression: str, where: str) -> Any:
    if isinstance(node, (ast.Call, ast.Name)):
        return _build(registry, node, expression, where)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"{where}: in '{expression}' the argument '{ast.unparse(node)}' is neither a literal "
            "(number, text in quotes, tuple) nor a block"
        ) from None
