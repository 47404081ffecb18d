"""FitNets: imitation of whole feature maps."""

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import MapSource, PairDistiller, PairTerm
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .options import conv_adapter

__all__ = ["FitNets", "add_fitnets_config"]


@CONFIG_NODES.register()
def add_fitnets_config(cfg: CN) -> None:
    """Add ``KD.FITNETS``."""
    cfg.KD.FITNETS = node = CN()
    # Weight of the mean squared difference, summed over the levels. 1.0: HEAD's official code
    # (RetinaNet R-18, with KD.INIT_STUDENT copying the teacher's head); 2.0 without adapter in
    # LD's official code.
    node.WEIGHT = 1.0
    # "conv": a 1x1 convolution per level (HEAD); "none": the widths must agree (LD's table);
    # "auto": a convolution where the widths differ.
    node.ADAPTER = "conv"
    # Levels that are paired: by "stride" or by "index".
    node.PAIR = "stride"
    # Maps of different size: "none" (an error), or resize the "student"'s or the "teacher"'s.
    node.RESIZE = "none"
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class FitNets(PairDistiller):
    """Mean squared difference of the pyramids, the student's behind a 1x1 convolution per level."""

    info = MethodInfo(
        title="FitNets: whole-feature imitation of the pyramid",
        paper="Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015",
        compares="pyramid maps, all positions",
        requires=("equal strides or resizing",),
        gains=(
            "GFL R-101 -> R-50: 40.2 -> 40.7 (LD's and CrossKD's tables)",
            "RetinaNet R-50 -> R-18: 31.7 -> 35.6 with inherited head (HEAD's repository)",
        ),
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        weight: float = 1.0,
        adapter: str = "conv",
        pair: str = "stride",
        resize: str = "none",
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            weight, adapter, pair, resize: see :func:`add_fitnets_config`.

        Raises:
            ValueError: an unknown ``adapter``, or networks that cannot be paired this way.
        """
        source = MapSource("neck", pair=pair, resize=resize)
        super().__init__(
            terms={"feat": PairTerm(source, adapter=conv_adapter("KD.FITNETS.ADAPTER", adapter))},
            weights={"feat": weight},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )
