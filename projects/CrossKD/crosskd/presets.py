"""Values of the authors' configurations, per detector, and how a config changes them."""

from dataclasses import dataclass, replace
from typing import Callable, Dict

from detectron2.config import CfgNode

from kd_d2.modeling.meta_arch.fcos import fcos_switches

from .options import choice, option

__all__ = ["ADAPTED", "OFFICIAL", "Preset", "find_preset", "preset_from_config"]


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
        keeps_average: the detector keeps a moving average of its positives ("ema").
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
    keeps_average: bool = False


OFFICIAL: Dict[str, Preset] = {
    "GFL": Preset(3, 1.0, 4.0, "kl", "positives_mean", "weights_local"),
    # the count of positives stays on its rank, unlike that of the other detectors
    "RetinaNet": Preset(
        3, 1.0, 1.0, "giou", "positives_local", "positives_local", keeps_average=True
    ),
    # the term on the centerness is in the code, not in the paper
    "ATSS": Preset(3, 1.0, 1.0, "giou", "positives_mean", "positives_mean", ctr_weight=1.0),
    # i = 2 (the paper says 3 for all); -ln IoU (eq. 5 writes GIoU); all positions including
    # padding; the centerness is computed behind the teacher's head but has no loss
    "FCOS": Preset(2, 0.4, 0.75, "iou_log", "centerness_mean", "centerness_mean", masked=False),
}


def _adapted_fcos(preset: Preset, model: CfgNode) -> Preset:
    """The official FCOS has -ln IoU itself; one that is trained with GIoU is distilled with it."""
    switches = fcos_switches(model.FCOS)
    return replace(
        preset,
        reg_loss={"iou": "iou_log", "giou": "giou"}[switches["BOX_LOSS"]],
        keeps_average=switches["NORMALIZER"] == "ema",
    )


# Detectors that exist in several kinds: (official values, cfg.MODEL) -> values of this kind. Ours:
# the authors have one kind of each.
ADAPTED: Dict[str, Callable[[Preset, CfgNode], Preset]] = {"FCOS": _adapted_fcos}


def find_preset(model: CfgNode) -> Preset:
    """Return the official values for the detector of ``cfg.MODEL``.

    Raises:
        ValueError: the authors have no configuration for it.
    """
    name = model.META_ARCHITECTURE
    if name not in OFFICIAL:
        raise ValueError(
            f"CrossKD has no preset for MODEL.META_ARCHITECTURE '{name}'; known: "
            f"{', '.join(sorted(OFFICIAL))}. Add one to kd_d2.projects.crosskd.presets.OFFICIAL"
        )
    adapt = ADAPTED.get(name, lambda preset, _: preset)
    return adapt(OFFICIAL[name], model)


def preset_from_config(node: CfgNode, model: CfgNode) -> Preset:
    """Return the preset of a detector with the values that ``KD.CROSSKD`` sets put over it.

    With ``PRESET "paper"``, regression counts at the positives only (S(r) of eq. 5) and every
    loss is divided by |S|, the size of its region, as eq. 4 and 5 are written.

    Args:
        node: ``cfg.KD.CROSSKD``.
        model: ``cfg.MODEL``, of the student.

    Raises:
        ValueError: unknown detector or name, a number that is neither -1 nor at least 0, or a
            moving average as normaliser of a detector that keeps none.
    """
    preset = find_preset(model)
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
    if name == "ema" and not preset.keeps_average:
        raise ValueError(
            'KD.CROSSKD.NORMALIZER is "ema", but the student, MODEL.META_ARCHITECTURE '
            f'"{model.META_ARCHITECTURE}", keeps no moving average of its positives (RetinaNet '
            'does, and FCOS with MODEL.FCOS.NORMALIZER "ema"); use "official" or "region"'
        )
    return replace(preset, **values)
