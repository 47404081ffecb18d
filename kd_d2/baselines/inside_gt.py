"""Inside-GT: imitation of the pyramid inside of ground-truth boxes."""

from detectron2.config import CfgNode as CN

from kd_d2.blocks.regions import GTCentre
from kd_d2.config import CONFIG_NODES
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .region_imitation import RegionImitation, add_region_imitation_config

__all__ = ["InsideGT", "add_inside_gt_config"]


@CONFIG_NODES.register()
def add_inside_gt_config(cfg: CN) -> None:
    """Add ``KD.INSIDEGT``."""
    cfg.KD.INSIDEGT = CN()
    add_region_imitation_config(cfg.KD.INSIDEGT)


@DISTILLER_REGISTRY.register()
class InsideGT(RegionImitation):
    """Mean squared difference of the pyramids where the anchor's centre is inside of any box.

    Every level uses every box, as in LD's official code.
    """

    info = MethodInfo(
        title="Inside-GT imitation",
        paper="as compared in Zheng et al., Localization Distillation for Dense Object Detection, "
        "CVPR 2022",
        compares="pyramid maps inside of ground-truth boxes",
        requires=("equal channels (or ADAPTER)", "equal strides", "ground truth", "anchors"),
        gains=("GFL R-101 -> R-50: 40.1 -> 40.7 (LD's table)",),
    )

    @classmethod
    def make_region(cls, node):
        return GTCentre()
