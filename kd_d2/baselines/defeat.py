"""DeFeat: imitation of foreground and background apart."""

from typing import Dict

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import Complement, ConvAdapter, PairDistiller, PairTerm, TrunkSource, Weights
from kd_d2.blocks.regions import GTCells
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .defeat_head import proposal_terms

__all__ = ["DeFeat", "add_defeat_config"]


@CONFIG_NODES.register()
def add_defeat_config(cfg: CN) -> None:
    """Add ``KD.DEFEAT``. A term whose weight is 0 does not exist."""
    cfg.KD.DEFEAT = node = CN()
    # Weight of the pyramid inside of the boxes; it belongs to the divisor twice the cells times
    # channels and the mean over levels. Official for VOC; none is published for COCO.
    node.FG_WEIGHT = 3.0
    # Weight of the pyramid outside of the boxes, likewise.
    node.BG_WEIGHT = 12.0
    # Weight of the backbone's stages inside of the boxes; 0.0 in the official configs.
    node.BACKBONE_FG_WEIGHT = 0.0
    # Weight of the backbone's stages outside of the boxes; 0.0 in the official configs.
    node.BACKBONE_BG_WEIGHT = 0.0
    # Two-stage only: weight of KL(teacher || student) of the class logits of foreground RoIs.
    # 2.0 in the official configs, but not activated there. The RoIs are those that the student
    # sampled; the official default, the teacher's, is not offered.
    node.HEAD_FG_WEIGHT = 0.0
    # The same of background RoIs.
    node.HEAD_BG_WEIGHT = 0.0
    # Temperature of that KL.
    node.HEAD_TEMPERATURE = 1.0
    # Official code offers DECAY linear, cosine and updown, by epochs.
    add_schedule_config(node)


def _map_terms(group: str, fg_weight: float, bg_weight: float):
    """Return the terms of one group of maps that have a weight; both share the convolutions."""
    names = {"neck": ("fg", "bg"), "backbone": ("backbone_fg", "backbone_bg")}[group]
    adapter, foreground = ConvAdapter(3, std=1e-4), GTCells("fpn")
    regions = (foreground, Complement(foreground))
    return {
        name: (
            PairTerm(
                TrunkSource(group),
                region=region,
                adapter=adapter,
                normaliser=Weights(2.0, channels=True, floor=1.0),
                levels="mean",
            ),
            weight,
        )
        for name, region, weight in zip(names, regions, (fg_weight, bg_weight))
        if weight
    }


@DISTILLER_REGISTRY.register()
class DeFeat(PairDistiller):
    """Squared difference of the pyramids inside of boxes and outside, each with its own weight.

    A box counts on the level of its size; the background of a level is all other cells, those of
    boxes of other levels included. The student passes a 3x3 convolution per level, the same for
    both terms. Terms of the backbone and, between two-stage detectors, of the RoIs' class logits
    exist when they have a weight.
    """

    info = MethodInfo(
        title="DeFeat: decoupled features",
        paper="Guo et al., Distilling Object Detectors via Decoupled Features, CVPR 2021",
        compares="pyramid maps inside and outside of ground-truth boxes; optionally backbone and "
        "class logits of RoIs",
        requires=("equal strides", "ground truth", "anchors"),
        gains=(
            "GFL R-101 -> R-50: 40.1 -> 40.8 (LD's table)",
            "Faster R-CNN R-152 -> R-50: 37.4 -> 40.9 (paper)",
            "RetinaNet -> R-50: 36.5 -> 39.7, other teacher and schedule (paper)",
        ),
        unverified="the teacher R-152 of the claim on COCO; the weights are VOC's",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        weights: Dict[str, float],
        head_temperature: float = 1.0,
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            weights: of the terms "fg", "bg", "backbone_fg", "backbone_bg", "head_fg" and
                "head_bg"; those that are missing or 0 do not exist.
            head_temperature: see :func:`add_defeat_config`.

        Raises:
            ValueError: no weight at all, a negative one, an unknown term, or
                networks that a term cannot compare.
        """
        _check_weights(weights)
        terms = {}
        for group, prefix in (("neck", ""), ("backbone", "backbone_")):
            terms.update(
                _map_terms(group, weights.get(f"{prefix}fg", 0.0), weights.get(f"{prefix}bg", 0.0))
            )
        terms.update(
            proposal_terms(
                weights.get("head_fg", 0.0),
                weights.get("head_bg", 0.0),
                head_temperature,
            )
        )
        super().__init__(
            terms={name: term for name, (term, _) in terms.items()},
            weights={name: weight for name, (_, weight) in terms.items()},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )

    @classmethod
    def arguments(cls, cfg):
        node = cls.config_node(cfg)
        return {
            "weights": {name: node[f"{name.upper()}_WEIGHT"] for name in _TERMS},
            "head_temperature": node.HEAD_TEMPERATURE,
        }


_TERMS = ("fg", "bg", "backbone_fg", "backbone_bg", "head_fg", "head_bg")


def _check_weights(weights: Dict[str, float]) -> None:
    for name, weight in weights.items():
        if name not in _TERMS:
            raise ValueError(f"DeFeat has no term '{name}'; terms: {', '.join(_TERMS)}")
        if not weight >= 0:
            raise ValueError(f"KD.DEFEAT.{name.upper()}_WEIGHT must be at least 0, got {weight}")
    if not any(weights.values()):
        raise ValueError("KD.DEFEAT: all weights are 0; give FG_WEIGHT or BG_WEIGHT a value")
