"""Where the losses apply: weights of positions."""

from typing import Callable, Dict, List, Sequence, Tuple

import torch
from detectron2.structures import Boxes
from torch import nn

from kd_d2.distillation import Assignment
from kd_d2.modeling.layers import valid_anchor_mask

__all__ = ["CLS_REGIONS", "REG_REGIONS", "Positions"]


class Positions:
    """The R positions (or anchors) of all levels of a batch, as the student's assigner sees them.

    Attributes:
        model: the student.
        anchors: (R, 4), absolute pixels of the padded input.
        boxes: (N, R, 4) matched ground truth, undefined outside ``positive``.
        positive: (N, R) bool.
        counted: (N, R) bool, False where the label weight is 0: at ignored anchors and in the
            padding that an image has only because of larger ones in its batch. Not every
            detector's assigner knows of that padding (Detectron2's RetinaNet does not). True
            everywhere for detectors whose official loss does not mask.
    """

    def __init__(
        self,
        model: nn.Module,
        anchors: List[Boxes],
        assignment: Assignment,
        image_sizes: Sequence[Tuple[int, int]],
        masked: bool,
    ):
        """
        Args:
            model: the student; its anchor generator and size divisibility say which cells belong
                to an image.
            anchors: per level.
            assignment: of the student's assigner.
            image_sizes: (h, w) of each image before padding.
            masked: whether positions outside an image or its loss do not count.
        """
        self.model = model
        self.anchors = Boxes.cat(anchors).tensor
        self.boxes = assignment.boxes
        self.positive = assignment.positive
        self.counted = torch.ones_like(self.positive)
        if masked:
            inside = _inside(model, anchors, image_sizes)
            self.positive = self.positive & inside
            self.counted = assignment.valid & inside


def _inside(model, anchors: List[Boxes], image_sizes) -> torch.Tensor:
    generator = model.anchor_generator
    divisibility = model.backbone.size_divisibility
    return torch.stack(
        [
            valid_anchor_mask(anchors, generator.strides, size, divisibility, generator.offset)
            for size in image_sizes
        ]
    )


CLS_REGIONS: Dict[str, Callable[[Positions], torch.Tensor]] = {
    "all": lambda positions: positions.counted,
    "pos": lambda positions: positions.positive,
    "neg": lambda positions: positions.counted & ~positions.positive,
}

# (positions, the teacher's highest logit (N, R, 1)) -> (N, R)
REG_REGIONS: Dict[str, Callable[[Positions, torch.Tensor], torch.Tensor]] = {
    "teacher": lambda positions, logits: logits.detach().float().sigmoid().amax(dim=-1)
    * positions.counted,
    "fg": lambda positions, logits: positions.positive.float(),
}
