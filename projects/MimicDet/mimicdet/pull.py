"""How strongly the mimic loss pulls at the S-head and the pyramid, and on which boxes."""

import math
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from .mimic_loss import MimicLoss
from .mimicdet import MimicDet

__all__ = ["PLACES", "MimicPull", "mimic_pull"]

PLACES = ("pyramid", "alignment", "1x1 layers")
"""Where gradients are compared: the maps P3 to P7, the S-head's alignment (micro-network and
kernels), and its projections and predictors."""


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
    """Place -> cosine between these two gradients: negative where the term works against them."""


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
    reference = _gradients(losses["loss_s_cls"] + losses["loss_s_reg"], tensors)
    return list(_pulls(recorder, recorder.gt_classes < model.num_classes, tensors, reference))


def _pulls(recorder, is_object: Tensor, tensors, reference) -> Iterator[MimicPull]:
    loss = recorder.loss
    sums: Dict[str, Dict[str, Tensor]] = {}
    means: Dict[str, float] = {}
    for boxes, mask in (("objects", is_object), ("background", ~is_object)):
        rows = mask.nonzero().flatten()
        share = len(rows) / max(len(mask), 1)
        distances = loss.distances(
            recorder.student.rows(rows), recorder.teacher.rows(rows), [recorder.gt_classes[rows]]
        )
        for term, weight in loss.weights(distances).items():
            gradients = _gradients(share * weight * distances[term], tensors)
            mean = distances[term].item() if len(rows) else math.nan
            yield _pull(term, boxes, len(rows), mean, gradients, reference)
            total = sums.get(term, dict.fromkeys(PLACES, 0))
            sums[term] = {place: total[place] + gradients[place] for place in PLACES}
            means[term] = means.get(term, 0.0) + share * distances[term].item()
    for term, gradients in sums.items():
        yield _pull(term, "all", len(is_object), means[term], gradients, reference)


def _pull(term, boxes, count, distance, gradients, reference) -> MimicPull:
    ratios = {p: (gradients[p].norm() / reference[p].norm()).item() for p in PLACES}
    agreement = {
        p: torch.cosine_similarity(gradients[p], reference[p], dim=0).item() for p in PLACES
    }
    return MimicPull(term, boxes, count, distance, ratios, agreement)


def _tensors(model: MimicDet, levels: Sequence[Tensor]) -> Dict[str, List[Tensor]]:
    head = model.s_head

    def trained(module: nn.Module) -> List[Tensor]:
        return [p for p in module.parameters() if p.requires_grad]

    pointwise = nn.ModuleList([head.projections, head.cls_score, head.bbox_pred])
    return dict(zip(PLACES, (list(levels), trained(head.align), trained(pointwise))))


def _gradients(loss: Tensor, tensors: Dict[str, List[Tensor]]) -> Dict[str, Tensor]:
    """Place -> one vector of the gradients of ``loss``, 0 where it does not depend on a tensor."""
    flat = [x for group in tensors.values() for x in group]
    found = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
    filled = iter(
        [torch.zeros_like(x) if g is None else g for x, g in zip(flat, found, strict=True)]
    )
    return {
        place: torch.cat([next(filled).flatten() for _ in group])
        for place, group in tensors.items()
    }
