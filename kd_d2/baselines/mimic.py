"""Mimic: the student's own predictions imitate the teacher's."""

from typing import Callable, Dict

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import (
    BCE,
    KL,
    QFL,
    Assigned,
    DenseSource,
    Distance,
    GIoU,
    PairDistiller,
    PairTerm,
    Positives,
    SideL1,
    TeacherBounded,
    Valid,
)
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .options import choice

__all__ = ["Mimic", "add_mimic_config"]


@CONFIG_NODES.register()
def add_mimic_config(cfg: CN) -> None:
    """Add ``KD.MIMIC``."""
    cfg.KD.MIMIC = node = CN()
    # Loss of the class scores, at all cells of the image: "qfl" (gamma 1), "bce" (its minimum is
    # the entropy of the teacher, not 0), "kl" (softmax over the classes), or "none".
    node.CLS_LOSS = "qfl"
    # Temperature of "kl".
    node.CLS_TAU = 1.0
    node.CLS_WEIGHT = 1.0
    # Loss of the boxes, at the student's positives: "l1" (deltas; expected distances for
    # distributions), "giou", "kl" (distributions, i.e. GFL), "bounded" (squared error to the
    # ground truth where the student is worse than the teacher), or "none".
    node.BOX_LOSS = "giou"
    # Temperature of "kl".
    node.BOX_TAU = 1.0
    # Margin of "bounded", in squared sides of the ground truth; >= 0.
    node.BOX_MARGIN = 0.0
    node.BOX_WEIGHT = 1.0
    # Weight of the cross-entropy of the centerness at positives; 0: no such term.
    node.CTR_WEIGHT = 0.0
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class Mimic(PairDistiller):
    """Plain prediction mimicking: class scores at all cells, boxes and centerness at positives.

    Every term is a sum divided by the number of the student's positives, the mean over all ranks
    and at least one an image. The recipes (losses, regions, divisor) are ours; the papers that
    quote the method give no settings.
    """

    info = MethodInfo(
        title="Prediction mimicking",
        paper="Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Chen et al., "
        "Learning Efficient Object Detection Models with Knowledge Distillation, NIPS 2017",
        compares="class scores, boxes, centerness of dense heads",
        requires=("equal heads and anchors", "ground truth"),
        gains=(
            "GFL R-50 -> R-18: 35.8 -> 37.8 (CrossKD's Table 1, boxes with CrossKD's region and "
            "divisor)",
        ),
        unverified="losses, regions and weights; the teacher-bounded loss is known from the paper "
        "alone and uses other units",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        cls_loss: str = "qfl",
        cls_tau: float = 1.0,
        cls_weight: float = 1.0,
        box_loss: str = "giou",
        box_tau: float = 1.0,
        box_margin: float = 0.0,
        box_weight: float = 1.0,
        ctr_weight: float = 0.0,
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            cls_loss, cls_tau, cls_weight, box_loss, box_tau, box_margin, box_weight, ctr_weight:
                see :func:`add_mimic_config`.

        Raises:
            ValueError: an unknown name, no term at all, or networks that cannot be paired.
        """
        cls_losses: Dict[str, Callable[[], Distance]] = {
            "qfl": lambda: QFL(1.0),
            "bce": BCE,
            "kl": lambda: KL(cls_tau),
        }
        box_losses: Dict[str, Callable[[], Distance]] = {
            "l1": SideL1,
            "giou": GIoU,
            "kl": lambda: KL(box_tau),
            "bounded": lambda: TeacherBounded(box_margin),
        }
        terms, weights = {}, {}
        if choice("KD.MIMIC.CLS_LOSS", cls_loss, (*cls_losses, "none")) != "none":
            terms["cls"] = PairTerm(
                DenseSource("cls"),
                region=Valid(),
                distance=cls_losses[cls_loss](),
                normaliser=Positives(),
            )
            weights["cls"] = cls_weight
        if choice("KD.MIMIC.BOX_LOSS", box_loss, (*box_losses, "none")) != "none":
            source = DenseSource("box", bins=box_loss == "kl")
            terms["box"] = _at_positives(source, box_losses[box_loss]())
            weights["box"] = box_weight
        if ctr_weight:
            terms["ctr"] = _at_positives(DenseSource("ctr"), BCE())
            weights["ctr"] = ctr_weight
        if not terms:
            raise ValueError(
                "KD.MIMIC: CLS_LOSS and BOX_LOSS are none and CTR_WEIGHT is 0; choose a term"
            )
        super().__init__(
            terms=terms, weights=weights, student_keys=student_keys, teacher_keys=teacher_keys
        )


def _at_positives(source: DenseSource, distance: Distance) -> PairTerm:
    return PairTerm(source, region=Assigned("pos"), distance=distance, normaliser=Positives())
