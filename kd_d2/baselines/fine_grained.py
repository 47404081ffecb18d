"""Fine-grained imitation as in LD's table: the pyramid near the anchors of objects."""

from detectron2.config import CfgNode as CN

from kd_d2.blocks.regions import NearAnchor
from kd_d2.config import CONFIG_NODES
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .region_imitation import RegionImitation, add_region_imitation_config

__all__ = ["FineGrained", "add_fine_grained_config"]


@CONFIG_NODES.register()
def add_fine_grained_config(cfg: CN) -> None:
    """Add ``KD.FINEGRAINED``."""
    cfg.KD.FINEGRAINED = node = CN()
    # A cell counts if one of its anchors has an IoU of more than this fraction of the largest IoU
    # of a box on all levels, in [0, 1).
    node.THRESHOLD = 0.5
    add_region_imitation_config(node)


@DISTILLER_REGISTRY.register()
class FineGrained(RegionImitation):
    """Mean squared difference of the pyramids near the anchors that fit a box best.

    FGFI's region on all levels without adapter and with another divisor, as LD's official code
    compares it; FGFI itself is :class:`FGFI`.
    """

    info = MethodInfo(
        title="Fine-grained imitation as in LD's table",
        paper="Wang et al., Distilling Object Detectors with Fine-grained Feature Imitation, CVPR "
        "2019, as compared in Zheng et al., Localization Distillation for Dense Object Detection, "
        "CVPR 2022",
        compares="pyramid maps near the anchors that fit a ground-truth box best",
        requires=("equal channels (or ADAPTER)", "equal strides", "ground truth", "anchors"),
        gains=("GFL R-101 -> R-50: 40.1 -> 41.1 (LD's table)",),
    )

    @classmethod
    def make_region(cls, node):
        if not 0 <= node.THRESHOLD < 1:
            raise ValueError(f"KD.FINEGRAINED.THRESHOLD must be in [0, 1), got {node.THRESHOLD}")
        return NearAnchor(node.THRESHOLD, scope="all")
