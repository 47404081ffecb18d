"""How strongly the mimic loss pulls at the S-head and the pyramid, and on which boxes."""

import math
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kd_d2.distillation import compare_gradients

from .mimic_loss import MimicLoss
from .mimicdet import MimicDet

__all__ = ["PLACES", "MimicPull", "mimic_pull"]

PLACES = ("pyramid", "alignment", "1x1 layers")
"""Where gradients are compared: the maps P3 to P7, the S-head's alignment (micro-network and
kernels), and its projections and predictors."""

_S_HEAD = "detection losses of the S-head"


class MimicPull(NamedTuple):
    """What was measured of one term of the mimic loss on one set of boxes, in one batch."""

    term: str
    """Name of the loss."""
    boxes: str
    """"objects", "background" or "all"."""
    count: int
    distance: float
    """Mean of 1 - cos over these boxes, unweighted; nan without boxes."""
    ratios: Dict[str, float]
    """Place -> norm of the gradient of the part of the (weighted) term that these boxes make up,
    divided by that of the S-head's detection losses."""
    agreement: Dict[str, float]
    """Place -> cosine between these two gradients: negative where the term works against them, 0
    without a gradient."""


class _Recorder:
    """Stands in for the mimic loss and keeps what it was called with."""

    def __init__(self, loss: MimicLoss):
        self.loss = loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def distances(self, student, teacher, gt_classes):
        self.student, self.teacher, self.gt_classes = student, teacher, torch.cat(gt_classes)
        return self.loss.distances(student, teacher, gt_classes)


def mimic_pull(model: MimicDet, batched_inputs: List[Dict[str, Any]]) -> List[MimicPull]:
    """Measure one batch; no weight and no gradient of ``model`` changes.

    Args:
        model: in training mode, with a mimic loss of all boxes.
        batched_inputs: with ground truth.

    Raises:
        ValueError: there is no mimic loss, or it leaves boxes out.
    """
    loss = model.mimic_loss
    if loss is None or loss.num_samples != -1 or loss.only_objects:
        raise ValueError(
            "the pull of the mimic loss is measured of a MimicDet with "
            "MODEL.MIMICDET.MIMIC.WEIGHT above 0, TEACHER.MODE shared, MIMIC.NUM_SAMPLES -1 and "
            "MIMIC.BOXES all"
        )
    recorder, kept = _Recorder(model.mimic_loss), {}
    hook = model.backbone.register_forward_hook(lambda *args: kept.update(args[-1]))
    model.mimic_loss = recorder
    try:
        with EventStorage(0):
            losses = model(batched_inputs)
    finally:
        model.mimic_loss = recorder.loss
        hook.remove()
    tensors = _tensors(model, [kept[name] for name in model.head_in_features])
    reference = losses["loss_s_cls"] + losses["loss_s_reg"]
    return _pulls(recorder, recorder.gt_classes < model.num_classes, tensors, reference)


def _pulls(recorder, is_object: Tensor, tensors, reference: Tensor) -> List[MimicPull]:
    loss = recorder.loss
    counts: Dict[str, int] = {}
    distances: Dict[Tuple[str, str], float] = {}
    losses: Dict[Any, Tensor] = {_S_HEAD: reference}
    for boxes, mask in (("objects", is_object), ("background", ~is_object)):
        rows = mask.nonzero().flatten()
        counts[boxes], share = len(rows), len(rows) / max(len(mask), 1)
        found = loss.distances(
            recorder.student.rows(rows), recorder.teacher.rows(rows), [recorder.gt_classes[rows]]
        )
        for term, weight in loss.weights(found).items():
            distances[term, boxes] = found[term].item() if len(rows) else math.nan
            losses[term, boxes] = share * weight * found[term]
            # boxes of one kind make up their share of the whole
            distances[term, "all"] = distances.get((term, "all"), 0) + share * found[term].item()
            losses[term, "all"] = losses.get((term, "all"), 0) + losses[term, boxes]
    counts["all"] = len(is_object)
    gradients = compare_gradients(losses, tensors, _S_HEAD)
    lengths = {place: max(of.norm, 1e-12) for place, of in gradients.pop(_S_HEAD).items()}
    return [
        MimicPull(
            term,
            boxes,
            counts[boxes],
            distances[term, boxes],
            {place: of.norm / lengths[place] for place, of in found.items()},
            {place: 0.0 if math.isnan(of.cosine) else of.cosine for place, of in found.items()},
        )
        for boxes in counts
        for (term, of_boxes), found in gradients.items()
        if of_boxes == boxes
    ]


def _tensors(model: MimicDet, levels: Sequence[Tensor]) -> Dict[str, List[Tensor]]:
    head = model.s_head

    def trained(module: nn.Module) -> List[Tensor]:
        return [p for p in module.parameters() if p.requires_grad]

    pointwise = nn.ModuleList([head.projections, head.cls_score, head.bbox_pred])
    return dict(zip(PLACES, (list(levels), trained(head.align), trained(pointwise))))
