"""Values of the authors' configurations, per detector, and how a config changes them."""

from dataclasses import dataclass, replace
from typing import Dict

from detectron2.config import CfgNode

from .options import choice, option

__all__ = ["OFFICIAL", "Preset", "find_preset", "preset_from_config"]


@dataclass(frozen=True)
class Preset:
    """Official values of one detector (crosskd configs and losses; gamma 1 and tau 1 throughout).

    Attributes:
        position: tower stages before the feature changes heads.
        cls_weight, reg_weight, ctr_weight: loss weights; 0 for ``ctr_weight`` means that there is
            no such term.
        reg_loss: key of ``losses.REG_LOSSES``.
        cls_normaliser, reg_normaliser, ctr_normaliser: keys of ``normalisers.NORMALISERS``.
        masked: positions that are ignored or lie in the padding do not count.
        reg_region: key of ``regions.REG_REGIONS``.
    """

    position: int
    cls_weight: float
    reg_weight: float
    reg_loss: str
    cls_normaliser: str
    reg_normaliser: str
    ctr_weight: float = 0.0
    ctr_normaliser: str = "positives_mean"
    masked: bool = True
    reg_region: str = "teacher"


OFFICIAL: Dict[str, Preset] = {
    "GFL": Preset(3, 1.0, 4.0, "kl", "positives_mean", "weights_local"),
    # the count of positives stays on its rank, unlike that of the other detectors
    "RetinaNet": Preset(3, 1.0, 1.0, "giou", "positives_local", "positives_local"),
    # the term on the centerness is in the code, not in the paper
    "ATSS": Preset(3, 1.0, 1.0, "giou", "positives_mean", "positives_mean", ctr_weight=1.0),
    # i = 2 (the paper says 3 for all); -ln IoU (eq. 5 writes GIoU); all positions including
    # padding; the centerness is computed behind the teacher's head but has no loss
    "FCOS": Preset(2, 0.4, 0.75, "iou_log", "centerness_mean", "centerness_mean", masked=False),
}


def find_preset(meta_architecture: str) -> Preset:
    """Return the official values for ``MODEL.META_ARCHITECTURE``.

    Raises:
        ValueError: the authors have no configuration for it.
    """
    if meta_architecture not in OFFICIAL:
        raise ValueError(
            f"CrossKD has no preset for MODEL.META_ARCHITECTURE '{meta_architecture}'; known: "
            f"{', '.join(sorted(OFFICIAL))}. Add one to kd_d2.projects.crosskd.presets.OFFICIAL"
        )
    return OFFICIAL[meta_architecture]


def preset_from_config(node: CfgNode, meta_architecture: str) -> Preset:
    """Return the preset of a detector with the values that ``KD.CROSSKD`` sets put over it.

    With ``PRESET "paper"``, regression counts at the positives only (S(r) of eq. 5) and every
    loss is divided by |S|, the size of its region, as eq. 4 and 5 are written.

    Raises:
        ValueError: unknown detector or name, or a number that is neither -1 nor at least 0.
    """
    preset = find_preset(meta_architecture)
    literal = choice("PRESET", node.PRESET, ("official", "paper")) == "paper"
    numbers = {
        "position": option("POSITION", node.POSITION),
        "cls_weight": option("CLS_WEIGHT", node.CLS_WEIGHT),
        "reg_weight": option("REG_WEIGHT", node.REG_WEIGHT),
        "ctr_weight": option("CTR_WEIGHT", node.CTR_WEIGHT),
    }
    values = {name: value for name, value in numbers.items() if value is not None}
    if literal:
        values["reg_region"] = "fg"
    if node.REG_REGION:
        values["reg_region"] = node.REG_REGION
    if node.REG_LOSS:
        values["reg_loss"] = node.REG_LOSS
    name = node.NORMALIZER or ("region" if literal else "official")
    if choice("NORMALIZER", name, ("official", "region", "ema")) != "official":
        values.update(cls_normaliser=name, reg_normaliser=name, ctr_normaliser=name)
    return replace(preset, **values)
