"""SSD's VGG against torchvision's feature extractor, and its shapes."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from torchvision.models import vgg16
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG

from kd_d2.config import get_cfg
from kd_d2.modeling.backbone import SSDVGG, build_ssd_vgg_backbone

EXTRAS_300 = ((256, 512, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 3, 1, 0), (128, 256, 3, 1, 0))
STRIDES_300 = (8, 16, 32, 64, 100, 300)
# whose maps are as odd as those of 300 pixels
SMALL = {
    "channels": (4, 4, 6, 8, 8),
    "depths": (1, 1, 2, 1, 1),
    "conv7_channels": 10,
    "extras": ((4, 6, 3, 2, 1), (4, 6, 3, 1, 0)),
    "strides": (8, 16, 32, 48),
}


@pytest.fixture(scope="module")
def pair():
    """Ours and torchvision's SSD300 extractor with the same weights."""
    torch.manual_seed(0)
    ours = SSDVGG(extras=EXTRAS_300, strides=STRIDES_300).eval()
    theirs = SSDFeatureExtractorVGG(vgg16(weights=None).features, highres=False).eval()
    source = [p for name, p in theirs.named_parameters() if name != "scale_weight"]
    target = [p for name, p in ours.named_parameters() if not name.startswith("l2norm")]
    with torch.no_grad():
        # torchvision lists conv1_1 .. conv4_3, conv5_1 .. conv5_3, conv6, conv7, extras; so do we
        for mine, other in zip(target, source, strict=True):
            mine.copy_(other)
        ours.l2norm.weight.copy_(torch.rand(512) + 1)
        theirs.scale_weight.copy_(ours.l2norm.weight)
    return ours, theirs


@pytest.mark.slow
def test_same_weights_same_maps_as_torchvision(pair):
    ours, theirs = pair
    x = torch.randn(1, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine, other = ours(x), theirs(x)
    assert list(mine) == list(ours.output_shape())
    assert [m.shape[-1] for m in mine.values()] == [38, 19, 10, 5, 3, 1]
    for (name, a), b in zip(mine.items(), other.values(), strict=True):
        assert a.shape[1] == ours.output_shape()[name].channels
        torch.testing.assert_close(a, b, msg=name)


def test_layers_have_torchvisions_indices():
    ours = SSDVGG(extras=EXTRAS_300, strides=STRIDES_300)
    theirs = vgg16(weights=None).features
    for index in range(30):
        assert type(ours.features[index]) is type(theirs[index]), index
    for key, value in theirs.state_dict().items():
        assert ours.features.state_dict()[key].shape == value.shape
    kinds = [type(layer).__name__ for layer in ours.features[30:]]
    assert kinds == ["MaxPool2d", "Conv2d", "ReLU", "Conv2d", "ReLU"]
    assert ours.features[31].dilation == (6, 6) and ours.features[33].kernel_size == (1, 1)
    assert not any(getattr(m, "inplace", False) for m in ours.modules())
    assert ours.l2norm.weight.unique().tolist() == [20.0]
    assert sum(p.numel() for p in ours.parameters()) == 34305206 - _head_parameters(ours)


def _head_parameters(backbone):
    widths = [shape.channels for shape in backbone.output_shape().values()]
    anchors = (4, 6, 6, 6, 4, 4)
    return sum(a * 85 * (9 * c + 1) for a, c in zip(anchors, widths))


@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("size", [75, 97, 128])
def test_map_sizes_are_those_of_the_maps(norm, size):
    backbone = SSDVGG(**SMALL, norm=norm).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, size, size))
    assert tuple(m.shape[-1] for m in maps.values()) == backbone.map_sizes(size)
    assert list(maps) == ["conv4_3", "conv7", "conv8_2", "conv9_2"]
    shapes = backbone.output_shape()
    assert [shapes[name].stride for name in maps] == [8, 16, 32, 48]
    assert [shapes[name].channels for name in maps] == [8, 10, 6, 6]
    biases = [name for name, p in backbone.named_parameters() if name.endswith("bias")]
    assert all((".1." in n or ".bias" in n) for n in biases)


def test_norm_replaces_the_bias_and_follows_every_conv():
    backbone = SSDVGG(**SMALL, norm="BN")
    convs = [m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(convs) == len(norms) == 12 and all(conv.bias is None for conv in convs)
    x = torch.randn(2, 3, 96, 96)
    # the first map is taken behind the ReLU of conv4_3, whose vectors have length 20
    conv4_3 = backbone(x)["conv4_3"]
    length = conv4_3.norm(dim=1)
    assert (conv4_3 >= 0).all() and torch.all(((length - 20).abs() < 1e-3) | (length == 0))


def test_too_small_an_input_is_refused():
    backbone = SSDVGG(**SMALL)
    with pytest.raises(ValueError, match="INPUT_SIZE 32 is too small"):
        backbone.map_sizes(32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"channels": (4, 4, 4)}, "CHANNELS and DEPTHS must have 5 entries"),
        ({"extras": ((4, 6, 3),)}, r"EXTRAS needs per level .* got \[\(4, 6, 3\)\]"),
        ({"strides": (8, 16)}, "makes 4 with conv4_3 and conv7, but MODEL.SSD.STRIDES has 2"),
    ],
)
def test_lists_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        SSDVGG(**{**SMALL, **change})


def test_initialisation():
    torch.manual_seed(0)
    backbone = SSDVGG(extras=EXTRAS_300, strides=STRIDES_300)
    conv6, extra = backbone.features[31].weight, backbone.extras[0][2].weight
    for weight in (conv6, extra):  # Xavier uniform: the bound is sqrt(6 / (fan_in + fan_out))
        bound = (6 / (9 * (weight.shape[0] + weight.shape[1]))) ** 0.5
        assert bound * 0.99 < weight.abs().max() <= bound
    vgg = backbone.features[10].weight  # normal, std sqrt(2 / fan_out)
    assert vgg.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    biases = [p for name, p in backbone.named_parameters() if name.endswith("bias")]
    assert len(biases) == 23 and all((bias == 0).all() for bias in biases)


def test_builder_reads_the_config():
    cfg = get_cfg()
    cfg.MODEL.SSD_VGG.CHANNELS, cfg.MODEL.SSD_VGG.CONV7_CHANNELS = (4, 4, 6, 8, 8), 10
    cfg.MODEL.SSD_VGG.DEPTHS, cfg.MODEL.SSD_VGG.EXTRAS = (1, 1, 2, 1, 1), ((4, 6, 3, 2, 1),)
    cfg.MODEL.SSD_VGG.NORM, cfg.MODEL.SSD_VGG.L2NORM_INIT = "BN", 7.0
    cfg.MODEL.SSD_VGG.DILATION = 2
    cfg.MODEL.SSD.STRIDES = (8, 16, 32)
    backbone = build_ssd_vgg_backbone(cfg, ShapeSpec(channels=1))
    assert backbone.features[0].weight.shape == (4, 1, 3, 3)
    assert backbone.l2norm.weight.tolist() == [7.0] * 8
    assert {m.dilation for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)} == {
        (1, 1),
        (2, 2),
    }
    assert backbone.map_sizes(64) == (8, 4, 2)
