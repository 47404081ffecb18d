"""Alignment layers: sampling points against hand-computed positions and RoIAlign."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from torchvision.ops import deform_conv2d, roi_align

from kd_d2.config import get_cfg
from kd_d2.projects.mimicdet.align import (
    ALIGN_REGISTRY,
    ConvAlign,
    DeformAlign,
    GuidedAlign,
    ROIConvAlign,
    build_align,
)
from kd_d2.projects.mimicdet.box_init import init_micro_network
from kd_d2.projects.mimicdet.offsets import box_offsets, offset_statistics

RAMP = (100.0 * torch.arange(12)[:, None] + torch.arange(12.0))[None, None]
DELTAS = (0.25, -0.125, math.log(1.5), 0.0)
BOX = (36.0, 24.0, 84.0, 56.0)
# of all nine taps on the centre of BOX, seen from cell (5, 6) on stride 8: dy, dx per tap
CENTRE = [0.5, 2, 0.5, 1, 0.5, 0, -0.5, 2, -0.5, 1, -0.5, 0, -1.5, 2, -1.5, 1, -1.5, 0]


def _deltas_at(y, x, deltas=DELTAS, size=(12, 12), dtype=torch.float32):
    result = torch.zeros(1, 4, *size, dtype=dtype)
    result[0, :, y, x] = torch.tensor(deltas, dtype=dtype)
    return result


def _fixed_offsets(layer, offsets):
    """``layer`` with these 2k^2 offsets at every cell: the biases of its last layer."""
    with torch.no_grad():
        layer.micro_network[-1].weight.zero_()
        layer.micro_network[-1].bias.copy_(torch.tensor(offsets))
    return layer


@pytest.mark.parametrize("tap, value", [((0, 0), 455.25), ((0, 2), 457.25), ((2, 1), 656.25)])
def test_channel_order_of_offsets(tap, value):
    number = tap[0] * 3 + tap[1]
    offsets = [0.0] * 18
    offsets[2 * number : 2 * number + 2] = 0.5, 0.25
    layer = _fixed_offsets(GuidedAlign(channels=1, kernel_size=3), offsets)
    with torch.no_grad():
        layer.conv.weight.zero_()
        layer.conv.weight[0, 0][tap] = 1
        assert layer(RAMP, torch.zeros(1, 4, 12, 12))[0, 0, 5, 6].item() == value


def test_all_taps_on_the_centre_of_the_adjusted_box():
    anchor = torch.tensor([[36.0, 28.0, 68.0, 60.0]])
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    box = transform.apply_deltas(torch.tensor([DELTAS]), anchor)
    torch.testing.assert_close(box, torch.tensor([BOX]))
    # cell (5, 6): centre (52, 44); the box's is (60, 40), one cell right and half a cell up
    layer = GuidedAlign(channels=1, kernel_size=3)
    torch.nn.init.ones_(layer.conv.weight)

    def value(offsets):
        with torch.no_grad():
            return _fixed_offsets(layer, offsets)(RAMP, torch.zeros(1, 4, 12, 12))[0, 0, 5, 6]

    assert value(CENTRE) == 9 * 457
    swapped = [x for dy, dx in zip(CENTRE[::2], CENTRE[1::2]) for x in (dx, dy)]
    assert value(swapped) == 5449.5
    assert value(CENTRE[::2] + CENTRE[1::2]) == 4707


def test_box_offsets_of_one_box():
    offsets = box_offsets(_deltas_at(5, 6), 3)[0, :, 5, 6].view(3, 3, 2)
    rows, columns = torch.tensor([-5 / 6, -0.5, -1 / 6]), torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(offsets[..., 0], rows[:, None].expand(3, 3))
    torch.testing.assert_close(offsets[..., 1], columns[None].expand(3, 3))


def test_no_deltas_spread_the_kernel_over_the_anchor():
    offsets = box_offsets(torch.zeros(1, 4, 1, 1), 5)[0, :, 0, 0].view(5, 5, 2)
    # five samples over four cells: 0.8 cells apart instead of 1
    expected = torch.tensor([0.4, 0.2, 0.0, -0.2, -0.4])
    torch.testing.assert_close(offsets[..., 0], expected[:, None].expand(5, 5))
    torch.testing.assert_close(offsets[..., 1], expected[None].expand(5, 5))


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("stride", [8, 32])
def test_taps_on_a_box_read_what_roi_align_reads(kernel_size, stride):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 1, 20, 24, generator=generator)
    deltas = (torch.rand(1, 4, 20, 24, generator=generator) - 0.5) * torch.tensor(
        [0.4, 0.4, 1.2, 1.2]
    ).view(1, 4, 1, 1)
    num_taps = kernel_size**2
    one_hot = torch.eye(num_taps).view(num_taps, 1, kernel_size, kernel_size)
    offsets = box_offsets(deltas, kernel_size)
    taps = deform_conv2d(features, offsets, one_hot, padding=kernel_size // 2)
    transform = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    for y, x in ((8, 9), (9, 14), (11, 5), (6, 17)):
        cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
        anchor = torch.tensor([[cx, cy, cx, cy]]) + 2 * stride * torch.tensor([[-1, -1, 1, 1]])
        box = transform.apply_deltas(deltas[0, :, y, x][None], anchor)
        expected = roi_align(features, [box], kernel_size, 1 / stride, 1, aligned=True)
        torch.testing.assert_close(taps[0, :, y, x], expected.flatten(), atol=1e-5, rtol=1e-5)


def test_roiconv_layer_is_roi_align_times_the_kernel():
    torch.manual_seed(0)
    layer = ROIConvAlign(channels=2, kernel_size=3)
    torch.nn.init.normal_(layer.conv.weight)
    features = torch.randn(1, 2, 12, 12)
    boxes = [torch.tensor([BOX])]
    pooled = roi_align(features, boxes, 3, 1 / 8, 1, aligned=True)[0]
    expected = (layer.conv.weight * pooled).sum(dim=(1, 2, 3)) + layer.conv.bias
    torch.testing.assert_close(layer(features, _deltas_at(5, 6))[0, :, 5, 6], expected)


def test_huge_deltas_keep_finite_offsets():
    deltas = torch.full((1, 4, 2, 2), 200.0).requires_grad_()
    layer = ROIConvAlign(channels=1, kernel_size=3)
    layer(torch.randn(1, 1, 2, 2), deltas).sum().backward()
    assert box_offsets(deltas, 3).isfinite().all() and deltas.grad.isfinite().all()


def test_taps_outside_of_the_map_leave_the_bias():
    layer = _fixed_offsets(GuidedAlign(channels=1, kernel_size=5), [100.0] * 50)
    torch.nn.init.constant_(layer.conv.bias, 0.75)
    out = layer(torch.randn(1, 1, 6, 6), torch.zeros(1, 4, 6, 6))
    assert (out == 0.75).all()


@pytest.mark.parametrize("name", ["guided", "deform"])
def test_layer_against_a_loop_over_cells_and_taps(name):
    torch.manual_seed(3)
    k, channels, height, width = 3, 2, 4, 5
    layer = _toy_layer(name, channels, k)
    features, deltas = torch.randn(1, channels, height, width), torch.randn(1, 4, height, width)
    actual, offsets = layer(features, deltas)[0], layer.offsets(features, deltas)[0]
    if name == "guided":  # the micro-network sees one cell and no position
        first, _, second, _, third = layer.micro_network
        hidden = deltas[0, :, 2, 3]
        for conv in (first, second, third):
            hidden = conv.weight[:, :, 0, 0] @ hidden + conv.bias
            hidden = hidden.relu() if conv is not third else hidden
        torch.testing.assert_close(offsets[:, 2, 3], hidden)
    for y in range(height):
        for x in range(width):
            expected = layer.conv.bias.clone()
            for row in range(k):
                for column in range(k):
                    dy, dx = offsets[2 * (row * k + column) :, y, x][:2].tolist()
                    value = _bilinear(features[0], y + row - 1 + dy, x + column - 1 + dx)
                    expected = expected + layer.conv.weight[:, :, row, column] @ value
            torch.testing.assert_close(actual[:, y, x], expected, atol=1e-5, rtol=1e-4)


def _bilinear(maps, y, x):
    """Value at a position, zero outside."""
    result = torch.zeros(len(maps))
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < maps.shape[1] and 0 <= j < maps.shape[2]:
                result += (1 - abs(y - i)) * (1 - abs(x - j)) * maps[:, i, j]
    return result


def _toy_layer(name, channels, kernel_size):
    cfg = get_cfg()
    cfg.MODEL.MIMICDET.S_HEAD.ALIGN = name
    cfg.MODEL.MIMICDET.S_HEAD.OFFSET_INIT_STD = 0.3
    layer = build_align(cfg, channels=channels, kernel_size=kernel_size)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("name", ["conv", "deform", "guided", "roiconv"])
def test_gradients_in_double_precision(name):
    torch.manual_seed(0)
    layer = _toy_layer(name, 2, 3).double()
    features = torch.randn(1, 2, 4, 3, dtype=torch.double, requires_grad=True)
    deltas = torch.randn(1, 4, 4, 3, dtype=torch.double).mul_(0.3).requires_grad_()
    assert torch.autograd.gradcheck(layer, (features, deltas))
    names, values = zip(*layer.named_parameters())

    def with_parameters(*parameters):
        inputs = features.detach(), deltas.detach()
        return torch.func.functional_call(layer, dict(zip(names, parameters)), inputs)

    assert torch.autograd.gradcheck(with_parameters, values, fast_mode=True)


def test_plain_convolution_and_untrained_deformable_one_are_equal():
    features, deltas = torch.randn(2, 3, 6, 7), torch.randn(2, 4, 6, 7)
    plain = ConvAlign(channels=3, kernel_size=5)
    deform = DeformAlign(channels=3, kernel_size=5)
    deform.conv.load_state_dict(plain.conv.state_dict())
    torch.testing.assert_close(deform(features, deltas), plain(features, deltas))
    assert not plain.offsets(features, deltas).any()
    assert plain.offsets(features, deltas).shape == deform.offsets(features, deltas).shape


@pytest.mark.parametrize(
    "name, kernel_size, micro",
    [("conv", 5, 0), ("deform", 5, 256 * 50 * 9 + 50), ("guided", 5, 15090), ("guided", 3, 10962)],
)
def test_number_of_parameters(name, kernel_size, micro):
    cfg = get_cfg()
    cfg.MODEL.MIMICDET.S_HEAD.ALIGN = name
    with torch.device("meta"):
        layer = build_align(cfg, channels=256, kernel_size=kernel_size)
    kernel = 256 * 256 * kernel_size**2 + 256
    assert sum(x.numel() for x in layer.parameters()) == kernel + micro


@pytest.mark.parametrize("std", [0.01, 0.1])
def test_initial_weights(std):
    torch.manual_seed(0)
    cfg = get_cfg()
    cfg.MODEL.MIMICDET.S_HEAD.OFFSET_INIT_STD = std
    layer = build_align(cfg, channels=64, kernel_size=5)
    assert isinstance(layer, GuidedAlign)
    assert layer.conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
    for conv in layer.micro_network[::2]:
        assert conv.weight.std().item() == pytest.approx(std, rel=0.15)
    assert all(not x.any() for name, x in layer.named_parameters() if name.endswith("bias"))
    # deltas of the size that real boxes have
    offsets = layer.offsets(torch.zeros(1, 64, 40, 40), 0.3 * torch.randn(1, 4, 40, 40))
    rms = offset_statistics([offsets])["rms"].item()
    assert {0.01: 3e-6, 0.1: 3e-3}[std] < rms < {0.01: 1e-4, 0.1: 0.1}[std]


@pytest.mark.parametrize("kernel_size, scale", [(3, 4.0), (5, 2.0)])
def test_micro_network_that_starts_on_the_box(kernel_size, scale):
    torch.manual_seed(0)
    options = {"channels": 2, "kernel_size": kernel_size, "anchor_scale": scale}
    guided, fixed = GuidedAlign(offset_init="box", **options), ROIConvAlign(**options)
    guided.conv.load_state_dict(fixed.conv.state_dict())
    deltas = 2 * torch.rand(2, 4, 7, 9) - 1
    features = torch.randn(2, 2, 7, 9)
    expected = fixed.offsets(features, deltas)
    offsets = guided.offsets(features, deltas)
    torch.testing.assert_close(offsets, expected, atol=0.01 * scale + 0.015, rtol=0)
    assert expected.abs().max() > scale / 2
    # at the knots nothing is interpolated, and what is left over of the network is noise
    knots = torch.tensor([-1.0, -0.25, 0.0, 0.5])[torch.randint(4, (2, 4, 7, 9))]
    expected = fixed.offsets(features, knots)
    torch.testing.assert_close(guided.offsets(features, knots), expected, atol=0.015, rtol=0)
    torch.testing.assert_close(guided(features, knots), fixed(features, knots), atol=0.01, rtol=0)
    # it is learnt like any other
    guided(features, deltas).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in guided.micro_network.parameters())


def test_start_of_the_micro_network_comes_from_the_config():
    cfg = get_cfg()
    cfg.MODEL.MIMICDET.S_HEAD.OFFSET_INIT = "box"
    cfg.MODEL.MIMICDET.REFINE.BASE_SCALE = 2.0
    deltas = torch.zeros(1, 4, 1, 1)
    for size in (3, 5):
        offsets = build_align(cfg, channels=2, kernel_size=size).offsets(deltas, deltas)
        torch.testing.assert_close(offsets, box_offsets(deltas, size, 2.0), atol=0.015, rtol=0)
    cfg.MODEL.MIMICDET.S_HEAD.OFFSET_INIT = "roi"
    with pytest.raises(ValueError, match="S_HEAD.OFFSET_INIT.*box.*gaussian.*'roi'"):
        build_align(cfg, channels=2, kernel_size=3)


def test_learning_rate_factor_scales_the_gradient_of_the_micro_network_alone():
    gradients = {}
    for factor in (1.0, 0.1):
        torch.manual_seed(0)
        layer = GuidedAlign(
            channels=2, kernel_size=3, offset_init="box", offset_lr_factor=factor
        ).double()
        torch.manual_seed(1)
        features = torch.randn(1, 2, 6, 6, dtype=torch.double)
        deltas = 0.2 * torch.randn(1, 4, 6, 6, dtype=torch.double)
        layer(features, deltas).square().sum().backward()
        gradients[factor] = {name: p.grad for name, p in layer.named_parameters()}
    for name, gradient in gradients[1.0].items():
        factor = 0.1 if name.startswith("micro_network") else 1.0
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[0.1][name], factor * gradient)
    with pytest.raises(ValueError, match="S_HEAD.OFFSET_LR_FACTOR must not be negative, got -1"):
        GuidedAlign(channels=2, kernel_size=3, offset_lr_factor=-1)


def test_too_narrow_a_micro_network():
    layers = [torch.nn.Conv2d(4, 16, 1), torch.nn.Conv2d(16, 128, 1), torch.nn.Conv2d(128, 18, 1)]
    with pytest.raises(ValueError, match="28 and 6 hidden channels, got 16 and 128"):
        init_micro_network(*layers, 3, 4.0)


@pytest.mark.parametrize("name", ["conv", "deform", "guided", "roiconv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_under_autocast(name, dtype):
    torch.manual_seed(0)
    layer = _toy_layer(name, 4, 3)
    features = torch.randn(1, 4, 6, 6).to(dtype).requires_grad_()
    deltas = torch.randn(1, 4, 6, 6).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(features, deltas)
    out.sum().backward()
    assert out.dtype is torch.float32 and features.grad.isfinite().all()
    torch.testing.assert_close(out, layer(features.float(), deltas.float()))


def test_bad_values_name_the_key():
    cfg = get_cfg()
    cfg.MODEL.MIMICDET.S_HEAD.ALIGN = "none"
    with pytest.raises(ValueError, match=r"S_HEAD.ALIGN.*conv.*deform.*guided.*roiconv.*'none'"):
        build_align(cfg, channels=2, kernel_size=3)
    with pytest.raises(ValueError, match="S_HEAD.KERNELS must be odd.*4"):
        ConvAlign(channels=2, kernel_size=4)
    assert {name for name, _ in ALIGN_REGISTRY} == {"conv", "deform", "guided", "roiconv"}


def test_statistics_of_offsets():
    # channels 0 and 1 of two cells: (1, 3) varies by 1 around 2, (5, 5) does not vary
    maps = torch.tensor([[1.0, 3.0], [5.0, 5.0]]).view(1, 2, 1, 2)
    statistics = offset_statistics([maps])
    assert statistics["rms"].item() == pytest.approx(math.sqrt((1 + 9 + 25 + 25) / 4))
    assert statistics["spatial_std"].item() == pytest.approx(math.sqrt((1 + 1 + 0 + 0) / 4))
    # a second level that is constant, with another value for each image: no deviation in space
    constant = torch.tensor([7.0, -7.0]).view(2, 1, 1, 1).expand(2, 2, 1, 2)
    statistics = offset_statistics([maps.requires_grad_(), constant])
    assert statistics["rms"].item() == pytest.approx(math.sqrt((60 + 8 * 49) / 12))
    assert statistics["spatial_std"].item() == pytest.approx(math.sqrt(2 / 12))
    assert not statistics["rms"].requires_grad
