"""RankMimic: the student ranks the positives of every object as the teacher does."""

from typing import Sequence

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import Assigned, DenseSource, Objects, PairDistiller, PairTerm, RankKL
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .options import choice

__all__ = ["RankMimic", "add_rank_mimic_config"]

# name of the term -> output that is compared
_OUTPUTS = {"score": "cls", "iou": "box"}


@CONFIG_NODES.register()
def add_rank_mimic_config(cfg: CN) -> None:
    """Add ``KD.RANKMIMIC``."""
    cfg.KD.RANKMIMIC = node = CN()
    # By what positives are ranked: "score" of the object's class, "iou" of the decoded box.
    node.QUALITIES = ("score",)
    # Weight of each. 4: a port of the paper (unverified).
    node.WEIGHT = 4.0
    # Temperature of the softmax over the positives; 1: ours.
    node.TAU = 1.0
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class RankMimic(PairDistiller):
    """KL divergence between the softmax over the positives of an object, mean over the objects.

    Unverified: the authors' code is not public; the formula is the paper's, the weight a port's.
    Objects without positives do not count.
    """

    info = MethodInfo(
        title="Rank mimicking (RM)",
        paper="Li et al., Knowledge Distillation for Object Detection via Rank Mimicking and "
        "Prediction-guided Feature Imitation, AAAI 2022",
        compares="scores of the positives of every object, relative to each other",
        requires=("equal heads and anchors", "ground truth"),
        gains=(
            "RetinaNet R-101 -> R-50: +1.4; with PFI 36.9 -> 40.4, in the ablation +2.9 (paper, "
            "unverified)",
        ),
        unverified="formula from the paper, weight from a port; temperature and probabilities "
        "instead of logits are ours",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        qualities: Sequence[str] = ("score",),
        weight: float = 4.0,
        tau: float = 1.0,
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            qualities, weight, tau: see :func:`add_rank_mimic_config`.

        Raises:
            ValueError: an unknown quality, or networks that cannot be paired.
        """
        if not qualities:
            raise ValueError(f"KD.RANKMIMIC.QUALITIES is empty; name some of {sorted(_OUTPUTS)}")
        for name in qualities:
            choice("KD.RANKMIMIC.QUALITIES", name, _OUTPUTS)
        super().__init__(
            terms={
                name: PairTerm(
                    DenseSource(_OUTPUTS[name]),
                    region=Assigned("pos"),
                    distance=RankKL(name, tau),
                    normaliser=Objects(),
                )
                for name in qualities
            },
            weights={name: weight for name in qualities},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )
