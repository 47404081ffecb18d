"""Made-up images and boxes, for measurements and trials that need no data set."""

from typing import Any, Dict, List

import torch
from detectron2.structures import Boxes, Instances

__all__ = ["random_batch"]


def random_batch(size: int, height: int, width: int, num_classes: int) -> List[Dict[str, Any]]:
    """Return Detectron2's ``batched_inputs``: noise with eight boxes an image, always the same.

    Args:
        size: number of images.
        height, width: of every image, pixels.
        num_classes: classes are drawn from 0..num_classes-1.
    """
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(size):
        corners = torch.rand((8, 2), generator=generator) * torch.tensor([width, height]) * 0.7
        sides = (torch.rand((8, 2), generator=generator) * 0.25 + 0.05) * min(height, width)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat((corners, corners + sides), dim=1))
        instances.gt_classes = torch.randint(num_classes, (8,), generator=generator)
        shape = (3, height, width)
        image = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch
