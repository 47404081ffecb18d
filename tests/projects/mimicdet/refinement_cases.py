"""A refinement module without detector, its inputs, and the toy ground truth of the assignment."""

import contextlib
import math

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from .whole import mimicdet_cfg

NAMES = ("p3", "p4", "p5", "p6", "p7")
STRIDES = (8, 16, 32, 64, 128)
SIDES = (32, 64, 128, 256, 512)
CHANNELS = 16
IMAGE_SIZE = (512, 512)

# eight boxes in an image of 512x512, and the numbers of the anchors that each of them gets
GROUND_TRUTH = (
    [100, 100, 148, 148],
    [96, 96, 192, 192],
    [90, 60, 190, 240],
    [40, 40, 52, 52],
    [44, 44, 60, 60],
    [0, 0, 512, 512],
    [200, 200, 264, 264],
    [102, 102, 150, 150],
)
POSITIVES = (
    [975],
    [4360, 4361, 4392, 4393],
    [5188, 5204],
    [],
    [390],
    [5445, 5446, 5449, 5450],
    [4558],
    [976, 1039, 1040],
)


def refinement(seed=0, lively=False, **overrides):
    """The module on 16 channels, in training mode; ``overrides`` are dotted keys of the config.

    ``lively``: weights of such a size that scores and deltas differ visibly between cells.
    """
    cfg = mimicdet_cfg(**overrides)
    shapes = {
        name: ShapeSpec(channels=CHANNELS, stride=stride) for name, stride in zip(NAMES, STRIDES)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build_proposal_generator(cfg, shapes).train()
        if lively:
            for layer in (module.rpn_head.conv, module.rpn_head.objectness_logits):
                torch.nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            torch.nn.init.normal_(module.rpn_head.anchor_deltas.weight, std=0.05)
    return module


def grids(size=IMAGE_SIZE):
    return [tuple(math.ceil(side / stride) for side in size) for stride in STRIDES]


def pyramid(num_images=1, size=IMAGE_SIZE, seed=0, requires_grad=False):
    """Random maps of each level for images of ``size``."""
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for name, grid in zip(NAMES, grids(size)):
        maps[name] = torch.randn(num_images, CHANNELS, *grid, generator=generator)
        maps[name].requires_grad_(requires_grad)
    return maps


def image_list(sizes, size=IMAGE_SIZE):
    return ImageList(torch.empty(len(sizes), 3, *size), list(sizes))


def truth(boxes, size=IMAGE_SIZE):
    """Ground truth of one image, all of class 0."""
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    return instances


@contextlib.contextmanager
def scalars():
    """A dictionary that has the logged scalars when the block is left."""
    values = {}
    with EventStorage() as storage:
        yield values
        values.update({name: value for name, (value, _) in storage.latest().items()})


def run(module, features, boxes, sizes=None, size=IMAGE_SIZE):
    """Output of one step on images with the given ground truth."""
    sizes = sizes or [size] * len(boxes)
    with EventStorage():
        return module(image_list(sizes, size), features, [truth(x, size) for x in boxes])
