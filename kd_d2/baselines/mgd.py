"""MGD: masked generative distillation."""

from typing import Dict

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import Images, MapSource, MaskedGenerator, PairDistiller, PairTerm
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .options import preset

__all__ = ["MGD", "add_mgd_config"]

# MODEL.META_ARCHITECTURE -> official values; those of GFL and ATSS are the dense ones (ours: the
# authors have no configuration for them)
_DENSE = ("RetinaNet", "FCOS", "GFL", "ATSS")
WEIGHTS: Dict[str, float] = {**dict.fromkeys(_DENSE, 2e-5), "GeneralizedRCNN": 5e-7}
MASK_RATIOS: Dict[str, float] = {**dict.fromkeys(_DENSE, 0.65), "GeneralizedRCNN": 0.45}


@CONFIG_NODES.register()
def add_mgd_config(cfg: CN) -> None:
    """Add ``KD.MGD``. -1.0: the official value of the student's family."""
    cfg.KD.MGD = node = CN()
    # Weight (alpha) of the sum of squares per image, summed over the levels; -1.0: 2e-5 dense,
    # 5e-7 two-stage.
    node.WEIGHT = -1.0
    # Probability (mu) that a position of the student's map is hidden; -1.0: 0.65 dense, 0.45
    # two-stage.
    node.MASK_RATIO = -1.0
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class MGD(PairDistiller):
    """Squared difference of the teacher's map and one restored from the student's masked map.

    alpha / N * sum (G(M * a(S)) - T)^2 per level, M at random, G two 3x3 convolutions, a a 1x1
    convolution where the widths differ. Two-stage: the levels of the RoI head, P2-P5. Not 0 for
    equal networks.
    """

    info = MethodInfo(
        title="MGD: masked generative distillation",
        paper="Yang et al., Masked Generative Distillation, ECCV 2022",
        compares="pyramid maps, the student's masked and restored by a generator",
        requires=("equal strides",),
        gains=(
            "RetinaNet X101-64x4d -> R-50 2x: 37.4 -> 41.0 with inherited neck and head "
            "(MGD's repository)",
            "RepPoints X101-DCN -> R-50 2x: 38.6 -> 42.3 (MGD's repository)",
            "Faster R-CNN, Cascade Mask X101-DCN -> R-50 2x: 38.4 -> 42.1 (MGD's repository)",
        ),
        unverified="weights for FCOS, GFL and ATSS are the dense ones without a published result",
    )

    @configurable
    def __init__(
        self, *, student_keys, teacher_keys, weight: float = 2e-5, mask_ratio: float = 0.65
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            weight, mask_ratio: see :func:`add_mgd_config`.

        Raises:
            ValueError: ``mask_ratio`` outside [0, 1), or no level in common.
        """
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"KD.MGD.MASK_RATIO must be in [0, 1), got {mask_ratio}")
        term = PairTerm(MapSource("neck"), adapter=MaskedGenerator(mask_ratio), normaliser=Images())
        super().__init__(
            terms={"feat": term},
            weights={"feat": weight},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )

    @classmethod
    def arguments(cls, cfg):
        node, arch = cls.config_node(cfg), cfg.MODEL.META_ARCHITECTURE
        return {
            "weight": preset("KD.MGD.WEIGHT", node.WEIGHT, WEIGHTS, arch),
            "mask_ratio": preset("KD.MGD.MASK_RATIO", node.MASK_RATIO, MASK_RATIOS, arch),
        }
