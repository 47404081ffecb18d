"""FRS: imitation where the teacher is confident ("feature richness score")."""

from typing import Dict

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import BCE, MapSource, PairDistiller, PairTerm, TrunkSource, Weights
from kd_d2.blocks.regions import TeacherConf
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .layout import require_same_predictions
from .options import conv_adapter, preset

__all__ = ["FRS", "add_frs_config"]

# MODEL.META_ARCHITECTURE -> official weight; ATSS: ours, as GFL
FEAT_WEIGHTS: Dict[str, float] = {
    "RetinaNet": 0.005,
    "FCOS": 0.01,
    "GFL": 0.1,
    "ATSS": 0.1,
    "GeneralizedRCNN": 0.002,
}
CLS_WEIGHTS: Dict[str, float] = {
    "RetinaNet": 0.02,
    "FCOS": 0.05,
    "GFL": 0.05,
    "ATSS": 0.05,
    "GeneralizedRCNN": 0.1,
}


@CONFIG_NODES.register()
def add_frs_config(cfg: CN) -> None:
    """Add ``KD.FRS``. -1.0: the official value of the student's family."""
    cfg.KD.FRS = node = CN()
    # Weight of the pyramid, summed over the levels; it belongs to the divisor, the sum of the
    # teacher's scores. 0.005 RetinaNet, 0.01 FCOS, 0.1 GFL, 0.002 two-stage.
    node.FEAT_WEIGHT = -1.0
    # Weight of the class logits (two-stage: objectness), likewise: 0.02 RetinaNet, 0.05 FCOS and
    # GFL, 0.1 two-stage.
    node.CLS_WEIGHT = -1.0
    # "conv": a 3x3 convolution per level (official; its module is not in the repository, so its
    # initialisation is PyTorch's); "auto": where the widths differ; "none".
    node.ADAPTER = "conv"
    add_schedule_config(node)
    # Official code: linear over 500 iterations.
    node.SCHEDULE.WARMUP_ITERS = 500


@DISTILLER_REGISTRY.register()
class FRS(PairDistiller):
    """Imitation of pyramid and class predictions, weighted by the teacher's highest score.

    Per level, w = max over anchors and classes of the teacher's probability: ``feat``
    sum w (a(S) - T)^2 / sum w, ``cls`` sum w BCE(sigma(s), sigma(t)) / sum w, both summed over the
    channels. Two-stage: the RPN's objectness, levels P2-P6. Ours: 1e-6 in the divisor.
    """

    info = MethodInfo(
        title="FRS: feature richness score",
        paper="Du et al., Distilling Object Detectors with Feature Richness, NeurIPS 2021",
        compares="pyramid maps and class logits where the teacher is confident",
        requires=("equal strides", "equal classes", "equal anchors where a cell has several"),
        gains=(
            "GFL R-101 -> R-50 2x: 42.9 -> 44.7, 1x: 43.6 (FRS's repository)",
            "RetinaNet R-101 -> R-50 2x: 37.4 -> 39.7 (FRS's repository)",
            "Faster R-CNN R-101 -> R-50 1x: 37.4 -> 39.5 (FRS's repository)",
            "FCOS R-101 -> R-50 2x: 38.5 -> 40.9 (FRS's repository)",
        ),
        unverified="initialisation of the convolutions; weights for ATSS are those of GFL",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        feat_weight: float = 0.005,
        cls_weight: float = 0.02,
        adapter: str = "conv",
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            feat_weight, cls_weight, adapter: see :func:`add_frs_config`; the defaults are
                RetinaNet's.

        Raises:
            ValueError: an unknown adapter, or networks with other levels, classes or anchors.
        """
        scores = "rpn.obj" if "rpn.obj" in student_keys else "pred.cls"
        require_same_predictions("FRS", student_keys, teacher_keys, scores)
        blocks = {"region": TeacherConf(), "normaliser": Weights(floor=0.0, eps=1e-6)}
        terms = {
            "feat": PairTerm(
                TrunkSource("neck"), adapter=conv_adapter("KD.FRS.ADAPTER", adapter, 3), **blocks
            ),
            "cls": PairTerm(MapSource(scores), distance=BCE(), **blocks),
        }
        super().__init__(
            terms=terms,
            weights={"feat": feat_weight, "cls": cls_weight},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )

    @classmethod
    def arguments(cls, cfg):
        node, arch = cls.config_node(cfg), cfg.MODEL.META_ARCHITECTURE
        return {
            **super().arguments(cfg),
            "feat_weight": preset("KD.FRS.FEAT_WEIGHT", node.FEAT_WEIGHT, FEAT_WEIGHTS, arch),
            "cls_weight": preset("KD.FRS.CLS_WEIGHT", node.CLS_WEIGHT, CLS_WEIGHTS, arch),
        }
