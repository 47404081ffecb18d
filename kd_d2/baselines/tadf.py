"""TADF's feature part: imitation under Gaussian masks of the ground truth."""

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import ConvAdapter, Elements, PairDistiller, PairTerm, TrunkSource, Weights
from kd_d2.blocks.regions import Gaussian
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .options import choice

__all__ = ["TADF", "add_tadf_config"]

_NORMALISERS = {"weights": lambda: Weights(2.0), "count": Elements}


@CONFIG_NODES.register()
def add_tadf_config(cfg: CN) -> None:
    """Add ``KD.TADF``."""
    cfg.KD.TADF = node = CN()
    # Weight of the mean over the levels. Ours: none is published for these blocks; FGFI's, which
    # divides likewise.
    node.WEIGHT = 0.01
    # Divisor of a level: "weights" (twice the sum of the mask; the paper, unverified) or "count"
    # (cells with a weight, times channels).
    node.NORMALIZER = "weights"
    # Evaluate the bell at the middle of a cell (ours), not at its corner as the port does.
    node.CENTER_CELL = False
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class TADF(PairDistiller):
    """Squared difference under Gaussian masks of the boxes, each on the level of its size.

    The student passes a 3x3 convolution per level. Unverified throughout: the mask is that of a
    port in DeFeat's repository, the divisor is the paper's, the weight and the convolution's
    initialisation (DeFeat's) are ours. The paper's decay over the run is a SCHEDULE.
    """

    info = MethodInfo(
        title="TADF: Gaussian-masked imitation (the feature part of task adaptive distillation)",
        paper="Sun et al., Distilling Object Detectors with Task Adaptive Regularization, 2020",
        compares="pyramid maps under a Gaussian in every ground-truth box",
        requires=("equal strides", "ground truth", "anchors"),
        gains=("Faster R-CNN R-50 -> R-18, Gaussian mask: 34.0 -> 35.4 (G-DetKD's Table 6)",),
        unverified="mask from a port, divisor from the paper, weight and initialisation ours",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        weight: float = 0.01,
        normalizer: str = "weights",
        center_cell: bool = False,
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            weight, normalizer, center_cell: see :func:`add_tadf_config`.

        Raises:
            ValueError: unknown ``normalizer``, or no level in common.
        """
        choice("KD.TADF.NORMALIZER", normalizer, _NORMALISERS)
        term = PairTerm(
            TrunkSource("neck"),
            region=Gaussian("fpn", center_cell),
            adapter=ConvAdapter(3, std=1e-4),
            normaliser=_NORMALISERS[normalizer](),
            levels="mean",
        )
        super().__init__(
            terms={"feat": term},
            weights={"feat": weight},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )
