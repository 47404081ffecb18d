"""Made-up images and boxes, for measurements and trials that need no data set."""

from typing import Any, Dict, List, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

__all__ = ["image_size_of", "random_batch"]


def image_size_of(cfg: CfgNode) -> Tuple[int, int]:
    """Height and width, in pixels, that a config's test images have at most, before padding.

    INPUT.MIN_SIZE_TEST x MAX_SIZE_TEST, a wide photograph; a square where the latter is so large
    that it limits nothing, and for SSD, which stretches its images.

    Raises:
        ValueError: INPUT.MIN_SIZE_TEST is 0, so that images keep the size they have.
    """
    if cfg.INPUT.MAPPER == "SSDMapper":
        return (cfg.MODEL.SSD.INPUT_SIZE,) * 2
    short, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    if short <= 0:
        raise ValueError(
            "INPUT.MIN_SIZE_TEST is 0, images keep their size; say which size is meant"
        )
    return (short, longest) if short <= longest <= 2 * short else (short, short)


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
