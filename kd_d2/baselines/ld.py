"""LD: localisation distillation of box-side distributions."""

from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Sequence

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import (
    KL,
    VLR,
    Assigned,
    Complement,
    Const,
    DenseSource,
    GISelect,
    Images,
    MapSource,
    PairDistiller,
    PairTerm,
    Product,
    StudentScore,
    Weights,
)
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

__all__ = ["LD", "LD_OFFICIAL", "LDPreset", "add_ld_config"]


@CONFIG_NODES.register()
def add_ld_config(cfg: CN) -> None:
    """Add ``KD.LD``."""
    cfg.KD.LD = node = CN()
    # "main": distributions of the box sides at positives; "vlr": the same in the valuable
    # localisation region; "cls": softmax over the classes at positives. The first two need
    # distributions: GFL, or ATSS and FCOS with MODEL.ATSS.REG_MAX, MODEL.FCOS.REG_MAX. ("main",) is
    # mmdetection's LD. Besides, "gi": squared difference of the pyramids at the 10 general
    # instances of every level (widths must agree).
    node.TERMS = ("main", "vlr", "cls")
    # Weights and temperatures; -1: the official value of the detector, see LD_OFFICIAL.
    node.MAIN_WEIGHT = -1.0
    # Temperature of "main" and "vlr".
    node.TAU = -1.0
    # Factor on MAIN_WEIGHT in "vlr".
    node.VLR_FACTOR = -1.0
    # Lower bound of the region, in thresholds of ATSS, [0, 1).
    node.VLR_GAMMA = 0.25
    node.CLS_WEIGHT = -1.0
    node.CLS_TAU = -1.0
    # Weight of "gi". Official: 2.
    node.GI_WEIGHT = 2.0
    # "official": "main" and "vlr" are sums over the images of a rank, so they grow with the batch;
    # the authors train with 2 or 3 images a GPU. "per_image": divided by images / 2 (ours).
    node.NORM = "official"
    add_schedule_config(node)


@dataclass(frozen=True)
class LDPreset:
    """Values of LD's official code for one detector.

    Attributes:
        main_weight, tau: of the distributions at positives.
        vlr_factor: on ``main_weight`` in the valuable localisation region.
        vlr_divisor: of the sum over region and sides.
        cls_weight, cls_tau: of the classification.
        vlr_weight: "iou" of the anchor, or the student's "score".
        vlr_positives: positives may lie in the region.
        vlr_anchor_scale: side of the squares that the region compares, in strides; 0: the anchors.
    """

    main_weight: float
    tau: float
    vlr_factor: float
    vlr_divisor: float
    cls_weight: float
    cls_tau: float
    vlr_weight: str = "iou"
    vlr_positives: bool = True
    vlr_anchor_scale: float = 0.0


# The anchor scale of FCOS is ours: its points have no size, GFL's and ATSS's anchors have 8.
LD_OFFICIAL: Dict[str, LDPreset] = {
    "GFL": LDPreset(0.25, 10.0, 1.0, 16.0, 10.0, 2.0),
    "ATSS": LDPreset(0.25, 10.0, 0.15, 4.0, 10.0, 2.0),
    "FCOS": LDPreset(0.25, 10.0, 0.25, 4.0, 10.0, 2.0, vlr_weight="score", vlr_anchor_scale=8.0),
    "RetinaNet": LDPreset(5.0, 10.0, 0.03, 4.0, 10.0, 8.0, vlr_positives=False),
}


@DISTILLER_REGISTRY.register()
class LD(PairDistiller):
    """KL divergence between the distributions of box sides, and between class distributions.

    ``main``: sum over positives and sides of q KL_tau / 4, q the student's largest class
    probability, a constant. ``vlr``: the same in the valuable localisation region with the
    anchors' IoU as weight, / 16 (GFL). Neither is divided by a number of positives. ``cls``: per
    level, KL of the softmax over the classes, sum over positives / their number. KL has the factor
    tau^2 and is the mean over bins or classes, as in the official code. ``gi``, off by default:
    mean squared difference of the pyramids at the anchors where the networks disagree most.
    """

    info = MethodInfo(
        title="LD: localisation distillation",
        paper="Zheng et al., Localization Distillation for Dense Object Detection, CVPR 2022; "
        "https://github.com/HikariTJU/LD",
        compares="distributions of box sides, class scores",
        requires=("equal heads and anchors", "ground truth", "box distributions (main, vlr)"),
        gains=(
            "GFL R-101 -> R-50: 40.1 -> 42.1, with gi 42.4 (LD's table)",
            "GFL R-101 -> R-50: 40.2 -> 43.0 (CrossKD's Table 7)",
            "GFL R-101 -> R-34: 38.9 -> 41.0, -> R-18: 35.8 -> 37.5 (LD's repository)",
            "GFL R-101 -> R-34, main only: 39.8, -> R-18: 36.5 (mmdetection)",
        ),
        unverified="of ATSS and FCOS with distributions: how they are trained, and the squares "
        "that stand for FCOS's points",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        preset: LDPreset,
        terms: Sequence[str] = ("main", "vlr", "cls"),
        vlr_gamma: float = 0.25,
        gi_weight: float = 2.0,
        norm: str = "official",
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            preset: weights and temperatures.
            terms, vlr_gamma, gi_weight, norm: see :func:`add_ld_config`.

        Raises:
            ValueError: an unknown name, or networks that cannot be paired this way.
        """
        if norm not in ("official", "per_image"):
            raise ValueError(f'KD.LD.NORM must be "official" or "per_image", got "{norm}"')
        makers: Dict[str, Callable[[], PairTerm]] = {
            "main": lambda: _main(preset, norm),
            "vlr": lambda: _vlr(preset, norm, vlr_gamma),
            "cls": lambda: _cls(preset),
            "gi": lambda: PairTerm(MapSource("neck"), region=GISelect(10, scope="level")),
        }
        unknown = [name for name in terms if name not in makers]
        if unknown or not terms:
            raise ValueError(f"KD.LD.TERMS must name some of {sorted(makers)}, got {tuple(terms)}")
        _check_distributions(terms, student_keys, teacher_keys)
        weights = {
            "main": preset.main_weight,
            "vlr": preset.main_weight * preset.vlr_factor,
            "cls": preset.cls_weight,
            "gi": gi_weight,
        }
        super().__init__(
            terms={name: makers[name]() for name in terms},
            weights={name: weights[name] for name in terms},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )

    @classmethod
    def arguments(cls, cfg):
        node = cls.config_node(cfg)
        return {
            "preset": _preset(cfg.MODEL.META_ARCHITECTURE, node),
            "terms": node.TERMS,
            "vlr_gamma": node.VLR_GAMMA,
            "gi_weight": node.GI_WEIGHT,
            "norm": node.NORM,
        }


def _preset(detector: str, node: CN) -> LDPreset:
    if detector not in LD_OFFICIAL:
        raise ValueError(
            f"LD has no values for MODEL.META_ARCHITECTURE '{detector}'; known: "
            f"{', '.join(sorted(LD_OFFICIAL))}. Two-stage detectors have no dense class scores or "
            "distributions to compare"
        )
    fields = ("main_weight", "tau", "vlr_factor", "cls_weight", "cls_tau")
    changes: Dict[str, Any] = {}
    for field in fields:
        value = node[field.upper()]
        if value != -1:
            if not value >= 0 or ("tau" in field and value == 0):
                raise ValueError(
                    f"KD.LD.{field.upper()} must be positive, or -1 for the official value, got "
                    f"{value}"
                )
            changes[field] = value
    return replace(LD_OFFICIAL[detector], **changes)


def _check_distributions(terms, student_keys, teacher_keys) -> None:
    if not {"main", "vlr"} & set(terms):
        return
    for side, keys in (("student", student_keys), ("teacher", teacher_keys)):
        facts = dict(keys["codec"].signature[1:]) if "codec" in keys else {}
        box_dim = facts.get("box_dim", 4)
        if box_dim <= 4:
            raise ValueError(
                f"KD.LD.TERMS {tuple(terms)}: 'main' and 'vlr' compare distributions over the "
                f"distance of every box side, but the {side} predicts {box_dim} numbers per box. "
                "Use GFL, or ATSS or FCOS with MODEL.ATSS.REG_MAX or MODEL.FCOS.REG_MAX 16, on "
                "both sides; or KD.LD.TERMS \"('cls',)\""
            )


def _divided(number: float, norm: str):
    """Sum over the rank's images / ``number``; "per_image" as if the rank had two of them."""
    return Const(number) if norm == "official" else Images(factor=number / 2)


def _main(preset: LDPreset, norm: str) -> PairTerm:
    return PairTerm(
        DenseSource("box", bins=True),
        region=Product(Assigned("pos"), StudentScore()),
        distance=KL(preset.tau, bins="mean"),
        normaliser=_divided(4.0, norm),
    )


def _vlr(preset: LDPreset, norm: str, gamma: float) -> PairTerm:
    by_score = preset.vlr_weight == "score"
    weight = "one" if by_score else "iou"
    parts = [VLR(gamma, weight=weight, anchor_scale=preset.vlr_anchor_scale)]
    if by_score:
        parts.append(StudentScore())
    if not preset.vlr_positives:
        parts.append(Complement(Assigned("pos")))
    return PairTerm(
        DenseSource("box", bins=True),
        region=Product(*parts),
        distance=KL(preset.tau, bins="mean"),
        normaliser=_divided(preset.vlr_divisor, norm),
    )


def _cls(preset: LDPreset) -> PairTerm:
    return PairTerm(
        DenseSource("cls", per_level=True),
        region=Assigned("pos"),
        distance=KL(preset.cls_tau, bins="mean"),
        normaliser=Weights(floor=1.0),
    )
