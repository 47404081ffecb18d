"""What is registered: methods with their config keys, and the blocks that recipes are made of."""

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Tuple

from detectron2.config import CfgNode

from kd_d2.blocks import registry as block_registries
from kd_d2.config import CONFIG_NODES, get_cfg
from kd_d2.distillation import DISTILLER_REGISTRY, Distiller, MethodInfo

from .config_comments import declared_comments

__all__ = ["Block", "ConfigKey", "Method", "list_blocks", "list_methods"]


@dataclass(frozen=True)
class ConfigKey:
    """A key of a method's node: dotted name, default, type of the default, meaning."""

    name: str
    default: Any
    type: str
    comment: str


@dataclass(frozen=True)
class Method:
    """A registered distiller.

    Attributes:
        name: in DISTILLER_REGISTRY, hence in KD.DISTILLERS.
        module: where it is defined.
        summary: first line of its docstring.
        needs_teacher: False for methods that have none.
        info: paper, demands and published gains; None if the class does not say.
        node: its config node, e.g. "KD.PKD".
        keys: of the node, as declared; empty if the node is not declared.
    """

    name: str
    module: str
    summary: str
    needs_teacher: bool
    info: Optional[MethodInfo]
    node: str
    keys: Tuple[ConfigKey, ...]

    def as_dict(self) -> Dict[str, Any]:
        """Return the same for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Block:
    """A registered block: registry, name, signature and first line of its docstring."""

    registry: str
    name: str
    signature: str
    summary: str

    def as_dict(self) -> Dict[str, str]:
        """Return the same for JSON."""
        return dataclasses.asdict(self)


def list_methods() -> List[Method]:
    """Return every registered distiller, in alphabetical order.

    Modules that register some are imported before: see :func:`kd_d2.engine.main.build_config`.
    """
    cfg = get_cfg()
    comments = declared_comments(function for _, function in CONFIG_NODES)
    methods = []
    for name, cls in sorted(DISTILLER_REGISTRY, key=lambda item: item[0].lower()):
        node = cls.node_name()
        keys = tuple(_keys(cfg.KD[node], f"KD.{node}", comments)) if node in cfg.KD else ()
        methods.append(
            Method(
                name=name,
                module=cls.__module__,
                summary=_summary(cls, Distiller),
                needs_teacher=cls.needs_teacher,
                info=cls.info,
                node=f"KD.{node}",
                keys=keys,
            )
        )
    return methods


def list_blocks() -> List[Block]:
    """Return the blocks of all registries of :mod:`kd_d2.blocks`, sources first."""
    names = ("SOURCES", "REGIONS", "ADAPTERS", "TRANSFORMS", "DISTANCES", "NORMALISERS")
    return [
        Block(f"KD_{kind}", name, f"{name}{_signature(cls)}", _summary(cls, object))
        for kind in names
        for name, cls in sorted(getattr(block_registries, f"KD_{kind}"))
    ]


def _keys(node: CfgNode, path: str, comments: Dict[str, str]) -> Iterator[ConfigKey]:
    for key, value in node.items():
        name = f"{path}.{key}"
        if isinstance(value, CfgNode) and value:
            yield from _keys(value, name, comments)
        else:
            kind = "node" if isinstance(value, CfgNode) else type(value).__name__
            default = {} if isinstance(value, CfgNode) else value
            yield ConfigKey(name, default, kind, comments.get(name, ""))


def _signature(cls: type) -> str:
    """The arguments as they are written in a config: without types."""
    parameters = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in inspect.signature(cls).parameters.values()
    ]
    return str(inspect.Signature(parameters))


def _summary(cls: type, base: type) -> str:
    """First paragraph line of the class's own docstring, not of a base class's."""
    own = cls.__doc__ if cls.__doc__ != base.__doc__ else None
    return " ".join(inspect.cleandoc(own or "").split("\n\n")[0].split())
