"""GID: general instances, the boxes about which student and teacher disagree most."""

from typing import Sequence

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import (
    BCE,
    ConvAdapter,
    DenseSource,
    GeneralInstances,
    Images,
    Matched,
    PairDistiller,
    PairTerm,
    PairwiseDistance,
    RoISource,
    SideL1,
    Vectors,
    Weights,
)
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, MethodInfo

from .options import choice

__all__ = ["GID", "add_gid_config"]

_TERMS = ("feat", "rel", "cls", "box")
_RESPONSES = ("matcher", "inside")
# MODEL.META_ARCHITECTURE -> preset of KD.GID.RESPONSE; "matcher" for the others
_RESPONSE_OF = {"FCOS": "inside"}


@CONFIG_NODES.register()
def add_gid_config(cfg: CN) -> None:
    """Add ``KD.GID``."""
    cfg.KD.GID = node = CN()
    # Terms: "feat" (pooled features), "rel" (their relations), "cls" and "box" (predictions).
    node.TERMS = _TERMS
    # General instances per image.
    node.NUM = 10
    # Of two whose IoU exceeds this the lower one is suppressed.
    node.NMS = 0.3
    # Candidates per image that enter the suppression.
    node.CANDIDATES = 3000
    # Weights: those of a port to Detectron2 (unverified). The paper has feat 5e-4, rel 40, cls 0.1
    # and box 1 (unverified; its feature term is not squared).
    node.FEAT_WEIGHT = 0.005
    node.REL_WEIGHT = 40.0
    node.CLS_WEIGHT = 0.1
    node.BOX_WEIGHT = 0.1
    # Side of the pooled features, cells, and sampling points per cell and direction.
    node.SIZE = 10
    node.SAMPLING_RATIO = 2
    # Predictions that "cls" and "box" compare: of the anchors that the student's matcher gives
    # to the boxes ("matcher") or of the points inside of them ("inside"); "": "inside" for FCOS.
    node.RESPONSE = ""
    # A 3x3 convolution on the student's pyramid, shared by its levels. Without, widths must agree.
    node.ADAPTER = True
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class GID(PairDistiller):
    """Imitation of features, relations and predictions at general instances.

    ``feat``: squared difference of the RoIAlign features of the boxes, sum over channels, mean over
    boxes and cells. ``rel``: Huber loss between normalised distances of the features of an image's
    boxes, mean over images. ``cls``, ``box``: cross-entropy and L1 of the predictions at the
    anchors that the student's matcher gives to the boxes (FCOS: the points inside), divided by
    their number.

    Unverified: formulas from the paper, weights and details from a port to Detectron2, in which
    the adapter is never applied (a defect). Boxes are clipped to the image, and left out if less
    than a pixel wide or high.
    """

    info = MethodInfo(
        title="GID: general instance distillation",
        paper="Dai et al., General Instance Distillation for Object Detection, CVPR 2021",
        compares="pooled features of general instances, their relations, predictions there",
        requires=("equal heads and anchors (one-stage)",),
        gains=(
            "RetinaNet R-101 -> R-50: 36.2 -> 39.1 (paper, unverified)",
            "FCOS R-101 -> R-50: 38.5 -> 42.0 (paper, unverified)",
        ),
        unverified="formulas from the paper, weights from a port",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        terms: Sequence[str] = _TERMS,
        num: int = 10,
        nms: float = 0.3,
        candidates: int = 3000,
        feat_weight: float = 0.005,
        rel_weight: float = 40.0,
        cls_weight: float = 0.1,
        box_weight: float = 0.1,
        size: int = 10,
        sampling_ratio: int = 2,
        adapter: bool = True,
        response: str = "matcher",
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            terms: which losses; this and all further arguments: see :func:`add_gid_config`.

        Raises:
            ValueError: an unknown term, or networks that cannot be paired this way.
        """
        unknown = [name for name in terms if name not in _TERMS]
        if unknown or not terms:
            raise ValueError(f"KD.GID.TERMS must name some of {_TERMS}, got {tuple(terms)}")
        boxes = GeneralInstances(num, nms, candidates)
        conv = ConvAdapter(3, shared=True) if adapter else None
        pooled = RoISource(boxes, size, sampling_ratio, adapter=conv)
        region = Matched(boxes, inside=choice("KD.GID.RESPONSE", response, _RESPONSES) == "inside")
        made = {
            "feat": lambda: PairTerm(pooled, normaliser=Weights(floor=1.0)),
            "rel": lambda: PairTerm(
                pooled, transform=Vectors(), distance=PairwiseDistance(), normaliser=Images()
            ),
            "cls": lambda: _response("cls", region, BCE()),
            "box": lambda: _response("box", region, SideL1()),
        }
        weights = dict(zip(_TERMS, (feat_weight, rel_weight, cls_weight, box_weight)))
        super().__init__(
            terms={name: made[name]() for name in terms},
            weights={name: weights[name] for name in terms},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )
        # sources are no modules: its parameters belong to the distiller
        self.adapter = conv if {"feat", "rel"} & set(terms) else None

    @classmethod
    def arguments(cls, cfg):
        preset = _RESPONSE_OF.get(cfg.MODEL.META_ARCHITECTURE, "matcher")
        return {**super().arguments(cfg), "response": cls.config_node(cfg).RESPONSE or preset}


def _response(output: str, region, distance) -> PairTerm:
    return PairTerm(
        DenseSource(output), region=region, distance=distance, normaliser=Weights(floor=1.0)
    )
