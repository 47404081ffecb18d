"""Small heads, pyramids and boxes for the tests of MimicDet's heads; no detector around them."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from detectron2.structures import Boxes, Instances

from kd_d2.projects.mimicdet.align import GuidedAlign
from kd_d2.projects.mimicdet.pooler import LevelROIPooler
from kd_d2.projects.mimicdet.s_head import MimicSHead
from kd_d2.projects.mimicdet.t_head import MimicTHead, TwoFeatureOutputLayers
from kd_d2.projects.mimicdet.variants import HEAD_VARIANTS

NUM_CLASSES = 3
CHANNELS = 6
FEATURE_DIM = 10
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
IMAGE_SIZE = (64, 96)
S_STRIDES = (8, 16, 32)
T_STRIDES = (4, 8, 16)


def grids(strides):
    return [(IMAGE_SIZE[0] // s, IMAGE_SIZE[1] // s) for s in strides]


def pyramid(strides, channels=CHANNELS, num_images=2, seed=0, requires_grad=False):
    """Random maps, one per stride."""
    generator = torch.Generator().manual_seed(seed)
    maps = [
        torch.randn(num_images, channels, *grid, generator=generator) for grid in grids(strides)
    ]
    return [x.requires_grad_(requires_grad) for x in maps]


def s_head(**options) -> MimicSHead:
    """An S-head of three levels with kernels 3, 5, 5, whose weights are of the order of 1."""
    torch.manual_seed(1)
    options.setdefault("kernels", (3, 5, 5))
    options.setdefault(
        "align",
        {
            k: GuidedAlign(channels=CHANNELS, kernel_size=k, offset_std=0.1)
            for k in sorted(set(options["kernels"]))
        },
    )
    head = MimicSHead(
        channels=CHANNELS,
        num_classes=NUM_CLASSES,
        box2box_transform=Box2BoxTransform(WEIGHTS),
        feature_dim=FEATURE_DIM,
        **options,
    )
    for layer in (*head.projections, head.cls_score, head.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=layer.in_channels**-0.5)
        torch.nn.init.normal_(layer.bias, std=0.1)
    for layer in head.align.values():
        torch.nn.init.normal_(layer.conv.weight, std=layer.conv.weight[0].numel() ** -0.5)
    return head


def t_head(variant="dual", level_assign="origin", resolution=4) -> MimicTHead:
    """A T-head of three levels."""
    torch.manual_seed(2)
    shape = ShapeSpec(channels=CHANNELS, height=resolution, width=resolution)
    return MimicTHead(
        in_features=("p2", "p3", "p4"),
        pooler=LevelROIPooler(
            output_size=resolution,
            scales=[1 / s for s in T_STRIDES],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
            level_assign=level_assign,
        ),
        branches=[
            FastRCNNConvFCHead(
                shape, conv_dims=[8] * branch.num_convs, fc_dims=[FEATURE_DIM] * branch.num_fcs
            )
            for branch in HEAD_VARIANTS[variant].branches
        ],
        predictor=TwoFeatureOutputLayers(
            ShapeSpec(channels=FEATURE_DIM),
            box2box_transform=Box2BoxTransform(WEIGHTS),
            num_classes=NUM_CLASSES,
            cls_agnostic_bbox_reg=True,
            test_score_thresh=0.005,
            test_nms_thresh=0.6,
        ),
        num_classes=NUM_CLASSES,
        batch_size_per_image=8,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.6], [0, 1]),
        proposal_append_gt=False,
    )


def proposals(num_boxes, seed=0, positives=0.4):
    """Labelled random boxes of random cells, one ``Instances`` per entry of ``num_boxes``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([h * w for h, w in grids(S_STRIDES)])
    result = []
    for count in num_boxes:
        cells = torch.randperm(int(sizes.sum()), generator=generator)[:count]
        instances = Instances(IMAGE_SIZE)
        instances.proposal_boxes = Boxes(_boxes(count, generator))
        instances.objectness_logits = torch.randn(count, generator=generator)
        instances.anchor_index = cells
        instances.level = torch.bucketize(cells, sizes.cumsum(0), right=True)
        classes = torch.randint(0, NUM_CLASSES, (count,), generator=generator)
        background = torch.rand(count, generator=generator) > positives
        instances.gt_classes = classes.masked_fill(background, NUM_CLASSES)
        instances.gt_boxes = Boxes(_boxes(count, generator))
        result.append(instances)
    return result


def _boxes(count, generator):
    corner = torch.rand(count, 2, generator=generator) * 30
    return torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 24], dim=1)


def cell_of(index):
    """(level, y, x) of a flat cell number, by walking over the levels."""
    for level, (height, width) in enumerate(grids(S_STRIDES)):
        if index < height * width:
            return level, index // width, index % width
        index -= height * width
    raise IndexError
