"""CWD: channel-wise distillation."""

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import KL, Flatten, Images, MapSource, PairDistiller, PairTerm
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .layout import require_same_predictions
from .options import choice, preset

__all__ = ["CWD", "add_cwd_config"]

# location -> (key of the taps, weight of the official configs)
_LOCATIONS = {"cls": ("pred.cls", 5.0), "neck": ("neck", 10.0)}


@CONFIG_NODES.register()
def add_cwd_config(cfg: CN) -> None:
    """Add ``KD.CWD``."""
    cfg.KD.CWD = node = CN()
    # "cls": the class logits of a dense head (GFL R-101 -> R-50, the configuration with a published
    # AP); "neck": the pyramid (official configs for RetinaNet and Faster R-CNN, no AP).
    node.LOCATION = "cls"
    # Weight of a level, summed; belongs to the divisor N*C. -1.0: 5.0 for "cls", 10.0 for "neck"
    # (official configs).
    node.WEIGHT = -1.0
    # Temperature of the softmax over the positions of a channel.
    node.TEMPERATURE = 1.0
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class CWD(PairDistiller):
    """tau^2 KL between the channels as distributions over the positions, mean over channels.

    p = softmax over H*W of T / tau per image and channel; sum of KL(p || q) / (N C) per level, sum
    over the levels. The padding counts, as in the official code.
    """

    info = MethodInfo(
        title="CWD: channel-wise knowledge distillation",
        paper="Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021",
        compares="class logits (or pyramid maps), each channel as a distribution over positions",
        requires=("equal channels", "equal strides", "equal anchors where a cell has several"),
        gains=("GFL R-101 -> R-50, class logits: 40.2 -> 41.9 (mmrazor)",),
        unverified="no AP is published for the pyramid",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        location: str = "cls",
        weight: float = 5.0,
        temperature: float = 1.0,
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            location, weight, temperature: see :func:`add_cwd_config`.

        Raises:
            ValueError: unknown location, a temperature that is not positive, or networks that
                differ in width, levels, classes or anchors.
        """
        key, _ = _LOCATIONS[choice("KD.CWD.LOCATION", location, _LOCATIONS)]
        if not temperature > 0:
            raise ValueError(f"KD.CWD.TEMPERATURE must be positive, got {temperature}")
        if location == "cls":
            require_same_predictions("CWD", student_keys, teacher_keys)
        term = PairTerm(
            MapSource(key),
            transform=Flatten(),
            distance=KL(temperature),
            normaliser=Images(channels=True),
        )
        super().__init__(
            terms={location: term},
            weights={location: weight},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )

    @classmethod
    def arguments(cls, cfg):
        node = cls.config_node(cfg)
        weights = {name: weight for name, (_, weight) in _LOCATIONS.items()}
        choice("KD.CWD.LOCATION", node.LOCATION, weights)
        weight = preset("KD.CWD.WEIGHT", node.WEIGHT, weights, node.LOCATION)
        return {**super().arguments(cfg), "weight": weight}
