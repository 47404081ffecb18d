"""A detector as a function from a tensor to tensors, which exporters can record.

Detectors loop over the images of a batch after their heads, so that a recording of them fits one
number of images. Here everything after the heads is done for all images together: candidates have
a fixed place in padded tensors and a score, which is negative where there is none. What comes
before, and the decoding of boxes and scores, is the detector's own code.
"""

from typing import Dict, NamedTuple, Tuple

import torch
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from .operators import PYTORCH, Operators

__all__ = [
    "DETECTION_GRAPHS",
    "DetectionGraph",
    "Detections",
    "NONE",
    "build_graph",
    "clip",
    "gather_rows",
    "is_nonempty",
    "register_graph",
]

DETECTION_GRAPHS = Registry("DETECTION_GRAPHS")
DETECTION_GRAPHS.__doc__ = """
Subclasses of :class:`DetectionGraph` by the name of the meta-architecture, which they are built
from. One that is not registered is treated like its base class.
"""

# Score of places in padded tensors that hold no candidate.
NONE = -1.0


class Detections(NamedTuple):
    """Detections of N images, best first, padded to D (``TEST.DETECTIONS_PER_IMAGE``)."""

    num_detections: Tensor
    """int64 (N,); rows beyond it are padding: zero boxes and scores, class -1."""
    boxes: Tensor
    """(N, D, 4) XYXY in pixels of the given images, clipped to them."""
    scores: Tensor
    """(N, D)"""
    classes: Tensor
    """int64 (N, D), 0..K-1."""


class DetectionGraph(nn.Module):
    """Base of the graphs: preprocessing before and the choice of detections after them.

    Images of a batch have the same size, which need not be a multiple of anything: padding to what
    the backbone needs is part of the graph. Resizing is not.
    """

    def __init__(self, model: nn.Module, operators: Operators = PYTORCH):
        """
        Args:
            model: the detector, in eval mode; kept as it is.
            operators: of the runtime.

        Raises:
            ValueError: this detector, or a setting of it, has no graph; says which and why.
        """
        super().__init__()
        self.check(model)
        self.model = model
        self.suppress = operators.suppress
        if self.max_detections < 1:
            raise ValueError(
                "A graph has room for a fixed number of detections, but "
                f"TEST.DETECTIONS_PER_IMAGE is {self.max_detections}: set it to a positive number."
            )

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            ValueError: this graph does not do what ``model`` does.
        """

    @property
    def settings(self) -> Dict[str, float]:
        """The numbers that the choice of detections depends on, "max_detections" among them."""
        raise NotImplementedError

    @property
    def max_detections(self) -> int:
        """D."""
        return self.settings["max_detections"]

    def detect(self, images: Tensor, size: Tuple[int, int]) -> Tuple[Tensor, Tensor, Tensor]:
        """Detections after suppression, in any order.

        Args:
            images: (N, 3, H, W), normalised and padded.
            size: (height, width) without padding.

        Returns:
            (N, M, 4) boxes in pixels, (N, M) scores, :data:`NONE` where there is no detection, and
            int64 (N, M) classes.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Detections:
        """
        Args:
            images: (N, 3, H, W) pixels in the order of ``INPUT.FORMAT``, 0 to 255, any type.
        """
        # The detectors take a list of images, a batch of one size is like one image to them.
        batch = self.model.preprocess_image([{"image": images.float()}])
        size = batch.image_sizes[0]
        boxes, scores, classes = self.detect(batch.tensor[0], size)
        boxes, scores, classes = self._best(boxes, scores, classes)
        # What detector_postprocess does, last: boxes are clipped, and dropped if nothing is left.
        boxes = clip(boxes, size)
        scores = torch.where(is_nonempty(boxes), scores, torch.full_like(scores, NONE))
        boxes, scores, classes = self._best(boxes, scores, classes)
        found = scores > NONE / 2
        return Detections(
            num_detections=found.sum(dim=1),
            boxes=boxes * found[..., None],
            scores=scores * found,
            classes=torch.where(found, classes, torch.full_like(classes, -1)),
        )

    def _best(self, boxes: Tensor, scores: Tensor, classes: Tensor):
        """The D best, best first, padded where there are fewer."""
        count = self.max_detections
        scores, index = F.pad(scores, (0, count), value=NONE).topk(count, dim=1)
        boxes = gather_rows(F.pad(boxes, (0, 0, 0, count)), index)
        return boxes, scores, F.pad(classes, (0, count)).gather(1, index)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """The given rows of each image.

    Args:
        values: (N, R, C).
        index: int64 (N, M).

    Returns:
        (N, M, C).
    """
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def clip(boxes: Tensor, size: Tuple[int, int]) -> Tensor:
    """Boxes (..., 4) clipped to an image of ``size``, (height, width), as Detectron2 does it."""
    clipped = Boxes(boxes.reshape(-1, 4))
    clipped.clip(size)
    return clipped.tensor.view_as(boxes)


def is_nonempty(boxes: Tensor, threshold: float = 0.0) -> Tensor:
    """Which boxes (..., 4) have sides longer than ``threshold``, bool (...)."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return (sides[..., 0] > threshold) & (sides[..., 1] > threshold)


def register_graph(*names: str):
    """Decorator: the class below is the graph of the meta-architectures ``names``."""

    def register(cls: type) -> type:
        for name in names:
            DETECTION_GRAPHS._do_register(name, cls)
        return cls

    return register


def build_graph(model: nn.Module, operators: Operators = PYTORCH) -> DetectionGraph:
    """The graph of a detector.

    Args:
        model: a detector in eval mode.
        operators: of the runtime.

    Raises:
        ValueError: there is none for this meta-architecture, or for a setting of it.
    """
    for base in type(model).__mro__:
        if base.__name__ in DETECTION_GRAPHS:
            return DETECTION_GRAPHS.get(base.__name__)(model, operators).eval()
    raise ValueError(
        f"{type(model).__name__} cannot be exported as a graph, only "
        f"{', '.join(sorted(name for name, _ in DETECTION_GRAPHS))}."
    )
