"""Registered data sets with their files, and registered methods, teachers and detectors."""

import os
from typing import Dict, Iterable, List, NamedTuple, Optional

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY

from kd_d2.data import dataset_root
from kd_d2.data.checks import absent_files
from kd_d2.distillation import DISTILLER_REGISTRY, KD_TAPS, TEACHER_REGISTRY

__all__ = ["Dataset", "datasets_text", "list_components", "list_datasets"]


class Dataset(NamedTuple):
    """A registered data set.

    Attributes:
        name: in Detectron2's catalogue.
        path: the first file that is missing, else the first that is there; absolute.
        missing: number of files and folders that are missing.
        source: how to get it, to follow "to get it, "; empty if that is not known.
        generated: it is made on first use and not there yet.
    """

    name: str
    path: str
    missing: int
    source: str
    generated: bool


def list_datasets(names: Optional[Iterable[str]] = None) -> List[Dataset]:
    """The registered ones of ``names``; None: those that kd_d2 registers, not Detectron2's own."""
    if names is None:
        names = [x for x in DatasetCatalog.list() if _is_ours(x)]
    return [_look(name) for name in sorted(names) if name in DatasetCatalog]


def _is_ours(name: str) -> bool:
    return MetadataCatalog.get(name).get("required_files") is not None


def _look(name: str) -> Dataset:
    metadata = MetadataCatalog.get(name)
    absent = absent_files(name)
    first = absent or metadata.get("required_files") or [metadata.get("json_file") or ""]
    path = os.path.abspath(first[0]) if first[0] else ""
    generated = not absent and bool(path) and not os.path.exists(path)
    return Dataset(name, path, len(absent), metadata.get("source") or "", generated)


def list_components() -> Dict[str, List[str]]:
    """Names in the registries: methods, teachers, detectors that have a tap."""
    tapped = {name for name, _ in KD_TAPS}
    detectors = [
        name
        for name, cls in META_ARCH_REGISTRY
        if tapped & {base.__name__ for base in getattr(cls, "__mro__", ())}
    ]
    return {
        "methods": sorted((name for name, _ in DISTILLER_REGISTRY), key=str.lower),
        "teachers": sorted(name for name, _ in TEACHER_REGISTRY),
        "detectors": sorted(detectors, key=str.lower),
    }


def datasets_text(datasets: List[Dataset]) -> List[str]:
    """Lines for the terminal: what is there, what is not, and how to get it."""
    root = os.path.abspath(dataset_root())
    variable = "set" if os.environ.get("DETECTRON2_DATASETS") else "not set"
    lines = [f"data sets below {root} (DETECTRON2_DATASETS is {variable})"]
    width = max((len(x.name) for x in datasets), default=0)
    for x in datasets:
        state = "found" if not x.missing else f"MISSING {x.missing}"
        state = "made on first use" if x.generated else state
        lines.append(f"  {x.name:<{width}}  {state:<17}  {x.path}")
    sources: Dict[str, List[str]] = {}
    for x in datasets:
        if x.missing and x.source:
            sources.setdefault(x.source, []).append(x.name)
    lines += [f"  to get {', '.join(names)}: {source}" for source, names in sources.items()]
    return lines
