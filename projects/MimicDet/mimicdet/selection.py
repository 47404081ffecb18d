"""Which adjusted boxes of an image the heads look at."""

from typing import Callable, Dict, Optional, Tuple

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor

__all__ = ["NMS_SCOPES", "select_boxes"]


def _own_level(level: Tensor) -> Tensor:
    return level


NMS_SCOPES: Dict[str, Callable[[Tensor], Tensor]] = {
    "joint": torch.zeros_like,
    "per_level": _own_level,
}
"""Values of ``MODEL.MIMICDET.PROPOSAL.NMS_SCOPE``: from the levels of boxes, (R,), to groups that
do not suppress one another."""


@torch.no_grad()
def select_boxes(
    boxes: Tensor,
    logits: Tensor,
    level: Tensor,
    image_size: Tuple[int, int],
    *,
    limit: int,
    limit_before: int = 0,
    min_size: float = 0.0,
    nms_thresh: Optional[float] = None,
    nms_scope: Callable[[Tensor], Tensor] = torch.zeros_like,
) -> Instances:
    """Return the best boxes of one image, best first.

    They have the fields ``proposal_boxes`` (clipped), ``objectness_logits``, ``anchor_index``
    (row in ``boxes``) and ``level``. Boxes and scores that are not finite are left out.

    Args:
        boxes: (A, 4), the adjusted box of every anchor.
        logits: (A,), their scores.
        level: (A,) int64.
        image_size: (height, width) that boxes are clipped to.
        limit: most boxes that are returned.
        limit_before: best boxes, before clipping and NMS, that are looked at; 0: all.
        min_size: clipped boxes with a side of at most this many pixels are dropped.
        nms_thresh: IoU above which a box suppresses a worse one; None: no NMS.
        nms_scope: see :data:`NMS_SCOPES`.
    """
    index = (boxes.isfinite().all(dim=1) & logits.isfinite()).nonzero().flatten()
    if 0 < limit_before < len(index):
        index = index[logits[index].topk(limit_before).indices]
    clipped = Boxes(boxes[index])
    clipped.clip(image_size)
    keep = clipped.nonempty(threshold=min_size)
    clipped, index = clipped[keep], index[keep]
    if nms_thresh is None:
        keep = logits[index].argsort(descending=True)
    else:
        keep = batched_nms(clipped.tensor, logits[index], nms_scope(level[index]), nms_thresh)
    keep = keep[:limit]
    index = index[keep]
    return Instances(
        image_size,
        proposal_boxes=clipped[keep],
        objectness_logits=logits[index],
        anchor_index=index,
        level=level[index],
    )
