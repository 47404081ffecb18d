"""General instances: the boxes about which student and teacher disagree most."""

from typing import List

import torch
from detectron2.structures import Boxes, Instances
from torchvision.ops import batched_nms

from kd_d2.distillation import require_equal, sigmoid_classes

from ..locations import anchor_rows
from ..registry import KD_REGIONS
from .base import AnchorRegion

__all__ = ["GISelect"]


@KD_REGIONS.register()
class GISelect(AnchorRegion):
    """1 at the anchors of the general instances of both networks.

    The score of an anchor is the largest difference max_c |sigmoid(t_c) - sigmoid(s_c)| of its
    class probabilities, its box that of the network with the higher probability of that class.
    After non-maximum suppression of every image by itself the best are kept. GID (Dai et al.,
    General Instance Distillation for Object Detection, CVPR 2021) keeps 10 an image, LD's official
    code 10 a level (but suppresses boxes of all images together, a defect).
    """

    student_needs = ("anchors", "pred.cls", "pred.box", "codec")
    teacher_needs = ("pred.cls", "pred.box", "codec")

    def __init__(
        self, num: int = 10, iou: float = 0.3, scope: str = "level", candidates: int = 3000
    ):
        """
        Args:
            num: instances that are kept.
            iou: above this the lower one of two boxes is suppressed.
            scope: what ``num``, ``candidates`` and the suppression refer to: every "level" by
                itself, or the whole "image".
            candidates: so many of the highest scores enter the suppression (the port of GID has
                3000). More give the same instances, unless fewer than ``num`` are left.

        Raises:
            ValueError: one of them is not as above.
        """
        if num < 1 or candidates < num or not 0 <= iou <= 1:
            raise ValueError(
                "GISelect: 1 <= num <= candidates and 0 <= iou <= 1 are needed, got "
                f"num={num}, candidates={candidates}, iou={iou}"
            )
        if scope not in ("level", "image"):
            raise ValueError(f'GISelect: scope must be "level" or "image", got {scope!r}')
        self._num, self._iou, self._scope, self._candidates = num, iou, scope, candidates

    def bind(self, student_keys, teacher_keys):
        for side, keys in (("student", student_keys), ("teacher", teacher_keys)):
            if "pred.cls" not in keys:
                raise ValueError(
                    f"GISelect compares 'pred.cls', which the {side} does not have: both must be "
                    "dense detectors"
                )
        for key in ("pred.cls", "anchors", "pred.box"):
            require_equal("GISelect", key, student_keys, teacher_keys)
        info = student_keys["pred.cls"]
        self._classes = sigmoid_classes("GISelect", "student", student_keys)
        self.strides = info.strides
        anchors_per_cell = info.channels // self._classes
        self._box_dim = student_keys["pred.box"].channels // anchors_per_cell

    def anchors(self, ctx):
        instances = self.instances(ctx)
        total = sum(len(boxes) for boxes in ctx.student["anchors"])
        weights = ctx.student["pred.cls"][0].new_zeros((len(instances), total), dtype=torch.float32)
        for row, found in zip(weights, instances):
            row[found.anchor] = 1.0
        return weights

    def instances(self, ctx) -> List[Instances]:
        """Return the instances of every image, best first: ``boxes`` (not clipped), ``scores`` and
        ``anchor``, the number of the anchor among those of all levels."""
        return ctx.memo((self, "instances"), lambda: self._instances(ctx))

    @torch.no_grad()
    def _instances(self, ctx):
        sides = (ctx.student, ctx.teacher)
        ours, theirs = (anchor_rows(side["pred.cls"], self._classes).sigmoid() for side in sides)
        scores, classes = (theirs - ours).abs().max(dim=2)
        at_class = classes[..., None]
        teacher_wins = (theirs.gather(2, at_class) > ours.gather(2, at_class))[..., 0]
        deltas = [anchor_rows(side["pred.box"], self._box_dim) for side in sides]
        anchors = ctx.student["anchors"]
        sizes = [len(boxes) for boxes in anchors]
        parts = sizes if self._scope == "level" else [sum(sizes)]
        anchors = Boxes.cat(anchors).tensor
        result = []
        for image, size in enumerate(ctx.image_sizes):
            kept, groups, start = [], [], 0
            for group, part in enumerate(scores[image].split(parts)):
                best = part.topk(min(self._candidates, len(part))).indices
                kept.append(best + start)
                groups.append(torch.full_like(best, group))
                start += len(part)
            rows, groups = torch.cat(kept), torch.cat(groups)
            boxes = [
                side["codec"].apply_deltas(x[image, rows], anchors[rows])
                for side, x in zip(sides, deltas)
            ]
            boxes = torch.where(teacher_wins[image, rows, None], boxes[1], boxes[0])
            # batched_nms sets groups apart by their largest coordinate only, but these boxes may
            # reach beyond the upper left corner of the image
            shifted = boxes.float() - boxes.min()
            keep = batched_nms(shifted, scores[image, rows], groups, self._iou)
            keep = torch.cat([keep[groups[keep] == g][: self._num] for g in range(len(parts))])
            keep = keep[scores[image, rows[keep]].argsort(descending=True, stable=True)]
            result.append(
                Instances(
                    size,
                    boxes=Boxes(boxes[keep]),
                    scores=scores[image, rows[keep]],
                    anchor=rows[keep],
                )
            )
        return result
