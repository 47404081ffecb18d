"""Where the losses apply: weights of positions."""

from typing import Callable, Dict, List

import torch
from detectron2.structures import Boxes
from torch import nn

from kd_d2.distillation import Assignment

__all__ = ["CLS_REGIONS", "REG_REGIONS", "Positions"]


class Positions:
    """The R positions (or anchors) of all levels of a batch, as the student's assigner sees them.

    Attributes:
        model: the student.
        anchors: (R, 4), absolute pixels of the padded input.
        boxes: (N, R, 4) matched ground truth, undefined outside ``positive``.
        positive: (N, R) bool.
        counted: (N, R) bool, False for ignored and invalid positions (label weight 0); True
            everywhere for detectors whose official loss does not mask.
    """

    def __init__(
        self, model: nn.Module, anchors: List[Boxes], assignment: Assignment, masked: bool
    ):
        self.model = model
        self.anchors = Boxes.cat(anchors).tensor
        self.boxes = assignment.boxes
        self.positive = assignment.positive
        self.counted = assignment.valid if masked else torch.ones_like(assignment.positive)


CLS_REGIONS: Dict[str, Callable[[Positions], torch.Tensor]] = {
    "all": lambda positions: positions.counted,
    "pos": lambda positions: positions.positive,
    "neg": lambda positions: positions.counted & ~positions.positive,
}

# (positions, teacher logits (N, R, K)) -> (N, R)
REG_REGIONS: Dict[str, Callable[[Positions, torch.Tensor], torch.Tensor]] = {
    "teacher": lambda positions, logits: logits.detach().float().sigmoid().amax(dim=-1)
    * positions.counted,
    "fg": lambda positions, logits: positions.positive.float(),
}
