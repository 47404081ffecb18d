"""Pooling on all levels and by size, against Detectron2's pooler and maps of known content."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes

from kd_d2.projects.gdetkd.level_pooling import pool_all_levels, pool_by_size

TWO_STAGE, DENSE = (4, 8, 16, 32), (8, 16, 32, 64, 128)


def pyramid(strides, images=2, channels=3, side=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, channels, side // s, side // s, generator=generator) for s in strides
    ]


def random_boxes(*counts, side=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for count in counts:
        sizes = 16 * 2 ** (5 * torch.rand(count, 1, generator=generator))
        sizes = sizes * (0.9 + 0.1 * torch.rand(count, 2, generator=generator))
        corners = torch.rand(count, 2, generator=generator) * (side - sizes).clamp(min=0)
        result.append(Boxes(torch.cat([corners, corners + sizes], dim=1)))
    return result


def test_level_of_the_heuristic_is_bitwise_that_of_detectron2():
    """50 boxes over P2-P5, adaptive sampling."""
    features, boxes = pyramid(TWO_STAGE), random_boxes(30, 20, seed=5)
    pooler = ROIPooler(7, [1 / s for s in TWO_STAGE], 0, "ROIAlignV2")
    expected = pooler(features, boxes)
    everything = pool_all_levels(features, TWO_STAGE, boxes, (7, 7), 0)
    assert everything.shape == (50, 4, 3, 7, 7)
    levels = assign_boxes_to_levels(boxes, 2, 5, 224, 4)
    assert levels.bincount(minlength=4).min() > 0
    assert torch.equal(everything[torch.arange(50), levels], expected)
    assert torch.equal(pool_by_size(features, TWO_STAGE, boxes, (7, 7), 0), expected)
    # not so with a fixed number of points
    assert not torch.equal(pool_by_size(features, TWO_STAGE, boxes, (7, 7), 4), expected)


@pytest.mark.parametrize("sampling_ratio", [0, 2, 4])
def test_cells_are_where_the_box_is(sampling_ratio):
    """Maps whose values are the coordinates: a bin is the coordinate of its centre."""
    strides = (4, 8, 16)
    features = []
    for stride in strides:
        centre = (torch.arange(256 // stride) + 0.5) * stride
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        features.append(torch.stack([torch.stack([x, y]), torch.stack([x, y]) + 1000]))
    boxes = [Boxes(torch.tensor([[40.0, 60, 110, 200]])), Boxes(torch.tensor([[64.0, 32, 96, 48]]))]
    pooled = pool_all_levels(features, strides, boxes, (7, 5), sampling_ratio)
    assert pooled.shape == (2, 3, 2, 7, 5)
    for row, box, offset in zip(pooled, ([40, 60, 110, 200], [64, 32, 96, 48]), (0, 1000)):
        x = box[0] + (torch.arange(5) + 0.5) * (box[2] - box[0]) / 5 + offset
        y = box[1] + (torch.arange(7) + 0.5) * (box[3] - box[1]) / 7 + offset
        for level in row:
            torch.testing.assert_close(level[0], x.expand(7, 5), rtol=0, atol=1e-3)
            torch.testing.assert_close(level[1], y[:, None].expand(7, 5), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "strides, side, level",
    [
        (TWO_STAGE, side, k)
        for side, k in ((111, 0), (112, 1), (223, 1), (224, 2), (448, 3), (1333, 3))
    ]
    + [
        (DENSE, side, k) for side, k in ((10, 0), (223, 0), (224, 1), (448, 2), (896, 3), (1792, 4))
    ],
)
def test_level_by_size(strides, side, level):
    features = [torch.full((1, 1, 4, 4), float(k)) for k in range(len(strides))]
    boxes = [Boxes(torch.tensor([[0.0, 0, side, side]]))]
    # maps are constant, so also beyond their few cells
    middle = pool_by_size(features, strides, boxes, (7, 7), 1)[0, 0, 0, 0]
    assert middle.item() == level


@pytest.mark.parametrize("counts", [(4, 0), (0, 4), (0, 0)])
def test_images_without_boxes(counts):
    features = [x.requires_grad_() for x in pyramid(TWO_STAGE)]
    boxes = random_boxes(*counts)
    for pooled in (
        pool_all_levels(features, TWO_STAGE, boxes, (7, 7), 4).sum(dim=1),
        pool_by_size(features, TWO_STAGE, boxes, (7, 7), 4),
    ):
        assert pooled.shape == (sum(counts), 3, 7, 7)
        gradients = torch.autograd.grad(pooled.sum(), features)
        assert all(g.isfinite().all() for g in gradients)
        assert any(g.any() for g in gradients) == any(counts)


def test_gradients_reach_every_level_and_no_box():
    features = [x.requires_grad_() for x in pyramid(DENSE)]
    boxes = random_boxes(3, 2)
    for b in boxes:
        b.tensor.requires_grad_()
    pool_all_levels(features, DENSE, boxes, (7, 7), 4).square().sum().backward()
    assert all(image.any() for x in features for image in x.grad)
    assert all(b.tensor.grad is None for b in boxes)


def test_half_precision_is_pooled_in_full():
    boxes = random_boxes(3, 2)
    half = [x.half() for x in pyramid(TWO_STAGE)]
    for pool in (pool_all_levels, pool_by_size):
        with torch.autocast("cpu", torch.bfloat16):
            pooled = pool(half, TWO_STAGE, boxes, (7, 7), 4)
        expected = pool([x.float() for x in half], TWO_STAGE, boxes, (7, 7), 4)
        assert pooled.dtype == torch.float32 and torch.equal(pooled, expected)
