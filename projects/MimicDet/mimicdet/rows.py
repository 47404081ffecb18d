"""Row numbers of some boxes of each image, where the boxes of all images are rows of one tensor."""

from typing import Callable, Sequence

import torch
from detectron2.modeling.sampling import subsample_labels
from torch import Tensor

__all__ = ["hardest_rows", "positive_rows", "random_rows"]


@torch.no_grad()
def hardest_rows(values: Tensor, num_boxes: Sequence[int], num_samples: int) -> Tensor:
    """Return the rows of the largest values of each image.

    Args:
        values: (R,).
        num_boxes: rows of each image, R in all.
        num_samples: most rows of an image; where there are fewer, all of them.

    Returns:
        (R',) int64, those of the first image first.
    """
    return _of_each_image(
        values, num_boxes, lambda x: x.topk(min(num_samples, len(x)), sorted=False).indices
    )


def positive_rows(
    gt_classes: Tensor, num_boxes: Sequence[int], num_samples: int, num_classes: int
) -> Tensor:
    """Return random rows with a class in 0..``num_classes`` - 1; otherwise as above.

    Args:
        gt_classes: (R,), the background is ``num_classes``.
    """
    return _of_each_image(
        gt_classes, num_boxes, lambda x: subsample_labels(x, num_samples, 1.0, num_classes)[0]
    )


def random_rows(num_boxes: Sequence[int], num_samples: int, device: torch.device) -> Tensor:
    """Return random rows, drawn without replacement; otherwise as above."""
    rows = torch.arange(sum(num_boxes), device=device)
    return _of_each_image(
        rows, num_boxes, lambda x: torch.randperm(len(x), device=device)[:num_samples]
    )


def _of_each_image(
    values: Tensor, num_boxes: Sequence[int], choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """``choose`` returns row numbers inside of an image."""
    rows, start = [], 0
    for x in values.split(list(num_boxes)):
        rows.append(start + choose(x))
        start += len(x)
    return torch.cat(rows)
