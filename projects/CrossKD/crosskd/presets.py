"""Values of the authors' configurations, per detector."""

from dataclasses import dataclass
from typing import Dict

__all__ = ["OFFICIAL", "Preset", "find_preset"]


@dataclass(frozen=True)
class Preset:
    """Official values of one detector (crosskd configs and losses; gamma 1 and tau 1 throughout).

    Attributes:
        position: tower stages before the feature changes heads.
        cls_weight, reg_weight, ctr_weight: loss weights; 0 means that there is no such term.
        reg_loss: key of ``losses.REG_LOSSES``.
        cls_normaliser, reg_normaliser, ctr_normaliser: keys of ``normalisers.NORMALISERS``.
        masked: positions that are ignored or lie in the padding do not count.
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


OFFICIAL: Dict[str, Preset] = {
    "GFL": Preset(3, 1.0, 4.0, "kl", "positives_mean", "weights_local"),
    "RetinaNet": Preset(3, 1.0, 1.0, "giou", "positives_local", "positives_local"),
    "ATSS": Preset(3, 1.0, 1.0, "giou", "positives_mean", "positives_mean", ctr_weight=1.0),
    # all positions including padding; centerness is computed there but has no loss
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
