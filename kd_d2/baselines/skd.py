"""SKD: imitation of feature maps by structural similarity."""

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import SSIM, MapSource, PairDistiller, PairTerm
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .options import conv_adapter

__all__ = ["SKD", "add_skd_config"]


@CONFIG_NODES.register()
def add_skd_config(cfg: CN) -> None:
    """Add ``KD.SKD``."""
    cfg.KD.SKD = node = CN()
    # Weight of the mean of (1 - SSIM) / 2, summed over the levels. Ours; calibrate it.
    node.WEIGHT = 4.0
    # L of SSIM's constants (.01 L)^2 and (.03 L)^2, in the unit of the features. Ours: the paper's
    # constants could not be checked.
    node.DATA_RANGE = 1.0
    # "auto": a 1x1 convolution per level where the widths differ; "conv": always; "none".
    node.ADAPTER = "auto"
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class SKD(PairDistiller):
    """(1 - SSIM) / 2 of the pyramids, mean over the elements of a level.

    SSIM of every channel in an 11x11 Gaussian window (sigma 1.5); mirrored borders, data range and
    weight are ours and unverified: no code of the authors was read.
    """

    info = MethodInfo(
        title="SKD: structural knowledge distillation",
        paper="de Rijk et al., Structural Knowledge Distillation for Object Detection, NeurIPS "
        "2022",
        compares="pyramid maps by structural similarity (SSIM)",
        requires=("equal strides",),
        gains=("GFL R-101 -> R-50: 40.2 -> 42.3 (CrossKD's table)",),
        unverified="everything: known from the paper only; weight, border, data range are ours",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        weight: float = 4.0,
        data_range: float = 1.0,
        adapter: str = "auto",
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            weight, data_range, adapter: see :func:`add_skd_config`.

        Raises:
            ValueError: an unknown adapter, a data range that is not positive, or networks that
                cannot be paired.
        """
        if not data_range > 0:
            raise ValueError(f"KD.SKD.DATA_RANGE must be positive, got {data_range}")
        term = PairTerm(
            MapSource("neck"),
            adapter=conv_adapter("KD.SKD.ADAPTER", adapter),
            distance=SSIM(data_range),
        )
        super().__init__(
            terms={"feat": term},
            weights={"feat": weight},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )
