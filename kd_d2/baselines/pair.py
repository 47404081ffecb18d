"""A distiller whose terms are written in the config, block by block."""

from typing import Dict, Mapping

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import (
    KD_ADAPTERS,
    KD_DISTANCES,
    KD_NORMALISERS,
    KD_REGIONS,
    KD_SOURCES,
    KD_TRANSFORMS,
    LEVELS,
    PairDistiller,
    PairTerm,
    build_block,
)
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

__all__ = ["Pair", "add_pair_config"]

_BLOCKS = {
    "SOURCE": KD_SOURCES,
    "REGION": KD_REGIONS,
    "ADAPTER": KD_ADAPTERS,
    "TRANSFORM": KD_TRANSFORMS,
    "DISTANCE": KD_DISTANCES,
    "NORMALISER": KD_NORMALISERS,
}


@CONFIG_NODES.register()
def add_pair_config(cfg: CN) -> None:
    """Add ``KD.PAIR``."""
    cfg.KD.PAIR = node = CN()
    # Any number of terms by name, each a node with these fields (all but SOURCE may be left out):
    #   SOURCE: "MapSource('neck')"      what is compared           (KD_SOURCES)
    #   REGION: "All()"                  where                      (KD_REGIONS)
    #   ADAPTER: "ConvAdapter(1)"        student's width to teacher's; none (KD_ADAPTERS)
    #   TRANSFORM: "Standardise()"       of both sides; none        (KD_TRANSFORMS)
    #   DISTANCE: "SquaredL2()"          how                        (KD_DISTANCES)
    #   NORMALISER: "Elements()"         divisor                    (KD_NORMALISERS)
    #   LEVELS: "sum"                    or "mean", over the levels
    #   WEIGHT: 1.0
    node.TERMS = CN(new_allowed=True)
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class Pair(PairDistiller):
    """Terms that a config composes from registered blocks: ``KD.PAIR.TERMS``."""

    info = MethodInfo(
        title="Blocks composed in the config",
        paper="kd_d2",
        compares="whatever KD.PAIR.TERMS says",
        requires=("what its blocks need",),
    )

    @configurable
    def __init__(
        self,
        *,
        terms: Mapping[str, PairTerm],
        weights: Dict[str, float],
        student_keys,
        teacher_keys,
    ):
        """See :class:`kd_d2.blocks.PairDistiller`."""
        super().__init__(
            terms=terms, weights=weights, student_keys=student_keys, teacher_keys=teacher_keys
        )

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node = cls.config_node(cfg)
        if not node.TERMS:
            raise ValueError("KD.PAIR.TERMS is empty; give at least one term with a SOURCE")
        terms, weights = {}, {}
        for name, fields in node.TERMS.items():
            terms[name], weights[name] = _term(f"KD.PAIR.TERMS.{name}", fields)
        return {
            "terms": terms,
            "weights": weights,
            "student_keys": student_keys,
            "teacher_keys": teacher_keys,
        }


def _term(where: str, fields: Mapping) -> tuple:
    """Return (term, weight) of one node; ``new_allowed`` switches yacs' own check off."""
    known = {*_BLOCKS, "LEVELS", "WEIGHT"}
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where} must be a node with SOURCE, ..., got '{fields}'")
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ValueError(f"{where} has no field {unknown[0]}; fields: {', '.join(sorted(known))}")
    if not fields.get("SOURCE"):
        raise ValueError(f"{where}.SOURCE is missing; e.g. \"MapSource('neck')\"")
    weight = fields.get("WEIGHT", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise ValueError(f"{where}.WEIGHT must be a number, got '{weight}'")
    if fields.get("LEVELS", "sum") not in tuple(LEVELS):
        raise ValueError(
            f"{where}.LEVELS must be one of {', '.join(LEVELS)}, got '{fields['LEVELS']}'"
        )
    blocks = {
        name.lower(): build_block(registry, fields[name], f"{where}.{name}")
        for name, registry in _BLOCKS.items()
        if fields.get(name)
    }
    source = blocks.pop("source")
    return PairTerm(source, levels=fields.get("LEVELS", "sum"), **blocks), float(weight)
