"""Who may import whom inside the repository; a reversed edge fails.

Imports are read from the source, so those inside functions and below ``TYPE_CHECKING`` count.
"""

import ast
import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Set

import pytest

ROOT = Path(__file__).parents[1]

# unit -> units it may import besides itself. "projects" is the package that finds the projects,
# "project" any concrete one.
ALLOWED = {
    "": set(),  # kd_d2 itself: importing it touches nothing
    "losses": set(),
    "modeling": {"losses"},
    "config": {"modeling"},
    "checkpoint": set(),
    "data": set(),
    "evaluation": {"data"},
    "visualization": {"data"},
    "distillation": {"checkpoint", "config", "modeling"},
    "blocks": {"losses", "modeling", "distillation"},
    "baselines": {"blocks", "config", "distillation", "losses", "modeling"},
    "export": {"checkpoint", "config", "modeling"},
    "analysis": {"checkpoint"},
    "engine": {
        *("checkpoint", "config", "data", "evaluation", "visualization", "export", "projects"),
        *("baselines", "blocks", "distillation", "losses", "modeling"),
    },
    "prediction": {"checkpoint", "data"},
    "doctor": {"analysis", "checkpoint", "data", "distillation", "engine", "projects"},
    "report": {
        *("analysis", "checkpoint", "config", "data", "engine", "evaluation", "visualization"),
    },
    "projects": set(),
    "project": {
        *("analysis", "baselines", "blocks", "distillation", "losses", "modeling", "config"),
        *("checkpoint", "data", "evaluation", "visualization", "export"),
    },
}
# libraries outside of the repository; units that are not listed may import any
EXTERNAL = {"losses": {"torch", "fvcore"}}


class Module(NamedTuple):
    """A source file: dotted name, whether it is a package's ``__init__``, and its text."""

    name: str
    is_package: bool
    source: str


def library_modules() -> List[Module]:
    """Every module of kd_d2 and of the packages of the projects, under its import name."""
    result = [_module(path, path.relative_to(ROOT)) for path in (ROOT / "kd_d2").rglob("*.py")]
    for init in (ROOT / "projects").glob("*/*/__init__.py"):
        for path in init.parent.rglob("*.py"):
            inside = path.relative_to(init.parents[1])
            result.append(_module(path, Path("kd_d2/projects") / inside))
    return result


def _module(path: Path, import_path: Path) -> Module:
    parts = list(import_path.with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    return Module(".".join(parts[:-1] if is_package else parts), is_package, path.read_text())


def imports_of(module: Module) -> Set[str]:
    """Dotted names that ``module`` imports; of ``from a import b`` both a and a.b."""
    found: Set[str] = set()
    for node in ast.walk(ast.parse(module.source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.name.split(".")
                package = package[: len(package) - node.level + module.is_package]
                base = ".".join(package + ([base] if base else []))
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args:
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function in ("import_module", "__import__"):
                found |= _literal(node.args[0])
    return found


def _literal(argument: ast.expr) -> Set[str]:
    """A constant name, or the constant beginning of an f-string."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    value = argument.value if isinstance(argument, ast.Constant) else None
    return {value.rstrip(".")} if isinstance(value, str) else set()


def unit_of(name: str) -> str:
    """Unit of ALLOWED that a module below kd_d2 belongs to; of a project: project:<package>."""
    parts = name.split(".")
    if len(parts) > 2 and parts[1] == "projects":
        return f"project:{parts[2]}"
    return parts[1] if len(parts) > 1 else ""


def violations(modules: List[Module]) -> List[str]:
    """One line per forbidden import."""
    units = {unit_of(module.name) for module in modules}
    result = []
    for module in modules:
        unit = unit_of(module.name)
        kind = unit.split(":")[0]
        if kind not in ALLOWED:
            result.append(f"{module.name}: '{unit}' has no place in the dependency direction")
            continue
        for target in sorted(imports_of(module)):
            top = target.split(".")[0]
            if top in ("train_net", "tests", "tools"):
                result.append(f"{module.name} imports {target}")
            elif top != "kd_d2":
                external = EXTERNAL.get(kind, {top})
                if top not in external and top not in sys.stdlib_module_names:
                    result.append(f"{module.name} imports {target}")
            else:
                other = unit_of(target)
                # "from kd_d2 import __version__": a name of the package, not a unit
                known = other in units or other.split(":")[0] in ALLOWED
                if other and known and other != unit and other not in ALLOWED[kind]:
                    result.append(f"{module.name} imports {target}")
    return result


def test_no_import_against_the_direction():
    modules = library_modules()
    names = {module.name for module in modules}
    # the walk saw what it should see
    assert {"kd_d2", "kd_d2.losses.box", "kd_d2.distillation.taps", "kd_d2.engine.trainer"} <= names
    assert "kd_d2.projects.crosskd.distiller" in names
    assert violations(modules) == []


def test_modeling_does_not_know_the_word_teacher():
    for path in (ROOT / "kd_d2" / "modeling").rglob("*.py"):
        assert not re.search("teacher", path.read_text(), re.IGNORECASE), path.name


def test_the_direction_has_no_cycle():
    done: Set[str] = set()
    remaining: Dict[str, Set[str]] = {k: set(v) for k, v in ALLOWED.items()}
    while remaining:
        free = {unit for unit, needs in remaining.items() if needs <= done}
        assert free, f"cycle among {sorted(remaining)}"
        done |= free
        remaining = {k: v for k, v in remaining.items() if k not in free}


REVERSED = [
    ("kd_d2.losses.box", "import kd_d2.modeling"),
    ("kd_d2.losses.box", "from ..modeling.layers import Scale"),
    ("kd_d2.losses.box", "import detectron2.layers"),
    ("kd_d2.losses.box", "from numpy import array"),
    ("kd_d2.modeling.meta_arch.gfl", "from kd_d2.distillation import Key"),
    ("kd_d2.modeling.meta_arch.gfl", "from ...distillation.taps import Key"),
    ("kd_d2.modeling.meta_arch.gfl", "from kd_d2 import distillation"),
    ("kd_d2.modeling.meta_arch.gfl", "def f():\n    import kd_d2.checkpoint.atomic as a"),
    ("kd_d2.modeling.meta_arch.gfl", "if TYPE_CHECKING:\n    from kd_d2.blocks import x"),
    ("kd_d2.modeling.config", "import kd_d2.config"),
    ("kd_d2.config", "import kd_d2.distillation"),
    ("kd_d2.checkpoint.atomic", "from kd_d2 import engine"),
    ("kd_d2.data.loader", "import kd_d2.engine.random_state"),
    ("kd_d2.distillation.taps", "from kd_d2.baselines.pkd import PKD"),
    ("kd_d2.distillation.taps", "from kd_d2.blocks import adapters"),
    ("kd_d2.distillation.taps", "from ..engine import KDTrainer"),
    ("kd_d2.distillation.taps", "import kd_d2.data"),
    ("kd_d2.distillation.taps", "import kd_d2.evaluation"),
    ("kd_d2.distillation.taps", "import kd_d2.projects"),
    ("kd_d2.blocks.adapters", "import kd_d2.baselines"),
    ("kd_d2.baselines.pkd", "import kd_d2.engine"),
    ("kd_d2.baselines.pkd", "import kd_d2.projects.crosskd"),
    ("kd_d2.engine.trainer", "import kd_d2.projects.crosskd.config"),
    ("kd_d2.engine.trainer", "importlib.import_module('kd_d2.projects.crosskd')"),
    ("kd_d2.engine.trainer", "from kd_d2.projects import crosskd"),
    ("kd_d2.export", "__import__('kd_d2.engine')"),
    ("kd_d2.engine.main", "import train_net"),
    ("kd_d2.projects.crosskd.distiller", "from kd_d2.engine import KDTrainer"),
    ("kd_d2.projects.crosskd.distiller", "from kd_d2.projects.gdetkd import queue"),
    ("kd_d2.projects.crosskd.distiller", "from ..gdetkd.queue import Queue"),
    ("kd_d2.projects.crosskd.distiller", "from .. import gdetkd"),
    ("kd_d2.somewhere.new", "import torch"),
]


@pytest.mark.parametrize("name, statement", REVERSED)
def test_a_reversed_edge_is_found(name, statement):
    found = violations([*library_modules(), Module(name, False, statement + "\n")])
    assert len(found) >= 1 and all(line.startswith(name) for line in found)


FORWARD = [
    (
        "kd_d2.losses.box",
        "import math, torch\nfrom fvcore.nn import giou_loss\nfrom . import quality",
    ),
    ("kd_d2.modeling.meta_arch.fcos", "from kd_d2.losses.box import iou_log_loss"),
    ("kd_d2.modeling.meta_arch.fcos", "from ..layers import Scale"),
    ("kd_d2.distillation.teacher", "from kd_d2.checkpoint import x\nfrom kd_d2.config import y"),
    ("kd_d2.engine.main", "import kd_d2.projects\nimportlib.import_module(f'kd_d2.projects.{n}')"),
    ("kd_d2.engine.main", "from kd_d2 import __version__"),
    ("kd_d2.projects.crosskd.distiller", "from .config import a\nfrom kd_d2.distillation import b"),
]


@pytest.mark.parametrize("name, statement", FORWARD)
def test_an_edge_in_the_right_direction_is_none(name, statement):
    assert violations([Module(name, False, statement)]) == []


@pytest.mark.parametrize(
    "name, is_package, statement, expected",
    [
        ("kd_d2.a.b", False, "from .c import d", {"kd_d2.a.c", "kd_d2.a.c.d"}),
        ("kd_d2.a.b", True, "from .c import d", {"kd_d2.a.b.c", "kd_d2.a.b.c.d"}),
        ("kd_d2.a.b", False, "from ..c import d", {"kd_d2.c", "kd_d2.c.d"}),
        ("kd_d2.a.b", True, "from .. import d", {"kd_d2.a", "kd_d2.a.d"}),
        ("kd_d2.a", False, "import x.y as z, w", {"x.y", "w"}),
    ],
)
def test_relative_imports_are_resolved(name, is_package, statement, expected):
    assert imports_of(Module(name, is_package, statement)) == expected
