"""RoIImitation: the features of boxes imitate the teacher's."""

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import PairDistiller, PairTerm, RoISource
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .options import choice, conv_adapter

__all__ = ["RoIImitation", "add_roi_imitation_config"]


@CONFIG_NODES.register()
def add_roi_imitation_config(cfg: CN) -> None:
    """Add ``KD.ROIIMITATION``."""
    cfg.KD.ROIIMITATION = node = CN()
    # Boxes: "gt" (annotated ones), or "student": the proposals that a two-stage student sampled,
    # the NUM best boxes of a one-stage student.
    node.ROIS = "gt"
    # Weight of the mean squared difference. Ours; no paper has this method by itself.
    node.WEIGHT = 1.0
    # Side of the pooled features, cells.
    node.SIZE = 7
    # Convolution on the student's pooled features: "auto" (where the widths differ), "conv" or
    # "none" (the widths must agree), and its kernel size, odd.
    node.ADAPTER = "auto"
    node.KERNEL_SIZE = 1
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class RoIImitation(PairDistiller):
    """Mean squared difference of RoIAlign features of the same boxes in both pyramids.

    One- and two-stage detectors may be mixed; levels that both have are pooled. The building block
    of Li et al. (Mimicking Very Efficient Network for Object Detection, CVPR 2017) and of the
    feature terms of G-DetKD and Joint-DetNAS; weight and adapter are ours.
    """

    info = MethodInfo(
        title="RoI feature imitation",
        paper="Li et al., Mimicking Very Efficient Network for Object Detection, CVPR 2017",
        compares="pooled features of ground-truth boxes or proposals",
        requires=("pyramid levels of equal stride", "ground truth"),
        unverified="weight, adapter and divisor are ours",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        rois: str = "gt",
        weight: float = 1.0,
        size: int = 7,
        adapter: str = "auto",
        kernel_size: int = 1,
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            rois, weight, size, adapter, kernel_size: see :func:`add_roi_imitation_config`.

        Raises:
            ValueError: an unknown name, or networks that cannot be paired this way.
        """
        source = RoISource(choice("KD.ROIIMITATION.ROIS", rois, ("gt", "student")), size=size)
        conv = conv_adapter("KD.ROIIMITATION.ADAPTER", adapter, kernel_size)
        super().__init__(
            terms={"feat": PairTerm(source, adapter=conv)},
            weights={"feat": weight},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )
