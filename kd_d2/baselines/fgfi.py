"""FGFI: fine-grained feature imitation near object anchors."""

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import ConvAdapter, MapSource, PairDistiller, PairTerm, TrunkSource, Weights
from kd_d2.blocks.regions import NearAnchor
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .options import choice, preset

__all__ = ["FGFI", "add_fgfi_config"]

# variant -> weight of the official code; each belongs to the divisor of the variant
_WEIGHTS = {"original": 0.01, "fpn": 3.0}
_STRIDE = 16
_STD = 1e-4


@CONFIG_NODES.register()
def add_fgfi_config(cfg: CN) -> None:
    """Add ``KD.FGFI``."""
    cfg.KD.FGFI = node = CN()
    # "original" (FGFI's official code): the map of stride 16 alone, a 3x3 convolution with ReLU,
    # divided by twice the number of cells (not times channels).
    # "fpn" (DeFeat's official code): all levels with anchors, 3x3 convolutions without ReLU, a box
    # on the level of its size, divided by twice the number of cells times channels, mean over
    # levels.
    node.VARIANT = "original"
    # Weight; -1.0: 0.01 for "original", 3.0 for "fpn" (VOC).
    node.WEIGHT = -1.0
    # A cell counts if one of its anchors has an IoU of more than this fraction of the largest IoU
    # of a box, in [0, 1).
    node.THRESHOLD = 0.5
    add_schedule_config(node)
    # Official code of the original: not in the first 400 iterations.
    node.SCHEDULE.START_ITER = 400


def _original(threshold: float, student_keys, teacher_keys) -> PairTerm:
    shared = [s for s in student_keys["neck"].strides if s in set(teacher_keys["neck"].strides)]
    if _STRIDE not in shared:
        raise ValueError(
            f"KD.FGFI.VARIANT 'original' compares the maps of stride {_STRIDE}, but student and "
            f"teacher share strides {tuple(shared)} of student {student_keys['neck'].strides} and "
            f"teacher {teacher_keys['neck'].strides}; use VARIANT 'fpn'"
        )
    return PairTerm(
        MapSource("neck", levels=(shared.index(_STRIDE),)),
        region=NearAnchor(threshold, scope="map"),
        adapter=ConvAdapter(3, relu=True, std=_STD),
        normaliser=Weights(2.0, floor=1.0),
    )


def _on_fpn(threshold: float, student_keys, teacher_keys) -> PairTerm:
    return PairTerm(
        TrunkSource("neck"),
        region=NearAnchor(threshold, scope="own"),
        adapter=ConvAdapter(3, std=_STD),
        normaliser=Weights(2.0, channels=True, floor=1.0),
        levels="mean",
    )


_VARIANTS = {"original": _original, "fpn": _on_fpn}


@DISTILLER_REGISTRY.register()
class FGFI(PairDistiller):
    """Squared difference near the anchors that fit a box best; the student behind a convolution.

    The official recipe clips the norm of the gradient at 10.
    """

    info = MethodInfo(
        title="FGFI: fine-grained feature imitation",
        paper="Wang et al., Distilling Object Detectors with Fine-grained Feature Imitation, CVPR "
        "2019",
        compares="the map of stride 16 (or the pyramid) near object anchors",
        requires=("a common level", "ground truth", "anchors"),
        gains=(
            "Faster R-CNN R-50 -> R-18, anchor mask: 34.0 -> 35.6 (G-DetKD's Table 6)",
            "GFL R-101 -> R-50 without adapter: see FineGrained",
        ),
        unverified="weight of the variant fpn is for VOC; no published result on COCO",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        variant: str = "original",
        weight: float = 0.01,
        threshold: float = 0.5,
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            variant, weight, threshold: see :func:`add_fgfi_config`.

        Raises:
            ValueError: unknown variant, a threshold outside [0, 1), or no level to compare.
        """
        choice("KD.FGFI.VARIANT", variant, _VARIANTS)
        if not 0 <= threshold < 1:
            raise ValueError(f"KD.FGFI.THRESHOLD must be in [0, 1), got {threshold}")
        super().__init__(
            terms={"feat": _VARIANTS[variant](threshold, student_keys, teacher_keys)},
            weights={"feat": weight},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )

    @classmethod
    def arguments(cls, cfg):
        node = cls.config_node(cfg)
        choice("KD.FGFI.VARIANT", node.VARIANT, _VARIANTS)
        weight = preset("KD.FGFI.WEIGHT", node.WEIGHT, _WEIGHTS, node.VARIANT)
        return {**super().arguments(cfg), "weight": weight}
