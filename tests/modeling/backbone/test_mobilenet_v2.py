"""MobileNetV2: equality with torchvision, freezing, pyramid."""

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone

from kd_d2.config import get_cfg
from kd_d2.modeling.backbone import MobileNetV2


def cfg_of():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_mobilenetv2_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    return cfg


def test_features_are_torchvisions():
    torch.manual_seed(0)
    reference = torchvision.models.mobilenet_v2(weights=None).eval()
    ours = MobileNetV2(out_features=("res2", "res3", "res4", "res5")).eval()
    missing, unexpected = ours.load_state_dict(reference.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"classifier.1.weight", "classifier.1.bias"}
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        out = ours(x)
        assert torch.equal(out["res5"], reference.features(x))
        assert torch.equal(out["res3"], reference.features[:7](x))
        assert torch.equal(out["res4"], reference.features[:14](x))
    shapes = {k: (v.channels, v.stride) for k, v in ours.output_shape().items()}
    assert shapes == {"res2": (24, 4), "res3": (32, 8), "res4": (96, 16), "res5": (1280, 32)}
    for name, (channels, stride) in shapes.items():
        assert out[name].shape == (1, channels, 64 // stride, 96 // stride)


def test_pyramid_trains_everything_by_default():
    net = build_backbone(cfg_of()).train()
    out = net(torch.randn(2, 3, 128, 128))
    assert [tuple(x.shape[1:]) for x in out.values()] == [(32, s, s) for s in (16, 8, 4, 2, 1)]
    sum(x.square().mean() for x in out.values()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.bottom_up.features[0][1].running_mean.abs().sum() > 0


def test_width_and_outputs():
    narrow = MobileNetV2(width_mult=0.5, out_features=("res3", "res4"))
    assert [v.channels for v in narrow.output_shape().values()] == [16, 48]
    assert len(narrow.features) == 14 and narrow.size_divisibility == 16


@pytest.mark.parametrize("freeze_at, first_trained", [(0, 0), (1, 2), (3, 7), (5, 19)])
def test_freeze(freeze_at, first_trained):
    net = MobileNetV2(freeze_at=freeze_at)
    for index, layer in enumerate(net.features):
        frozen = index < first_trained
        assert all(p.requires_grad != frozen for p in layer.parameters())
        kinds = {isinstance(m, FrozenBatchNorm2d) for m in layer.modules() if hasattr(m, "eps")}
        assert kinds == {frozen}


def test_frozen_norm_name():
    net = MobileNetV2(norm="FrozenBN")
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert any(p.requires_grad for p in net.features[0].parameters())


def test_last_layer_without_its_conv():
    """Layer 17 instead of the conv to 1280 channels behind it, which is then not there."""
    torch.manual_seed(0)
    reference = torchvision.models.mobilenet_v2(weights=None).eval()
    ours = MobileNetV2(out_features=("res5",), last_layer=17, freeze_at=5).eval()
    missing, unexpected = ours.load_state_dict(reference.state_dict(), strict=False)
    assert not missing
    assert {key.rsplit(".", 2)[0] for key in unexpected} == {"features.18", "classifier"}
    assert ours.output_shape()["res5"].channels == 320
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x)["res5"], reference.features[:18](x))
    assert not any(p.requires_grad for p in ours.parameters())


def rcnn_cfg(last_layer=18):
    cfg = cfg_of()
    cfg.MODEL.BACKBONE.NAME = "build_mobilenetv2_rcnn_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.MOBILENET_V2.OUT_FEATURES = ("res2", "res3", "res4", "res5")
    cfg.MODEL.MOBILENET_V2.LAST_LAYER = last_layer
    return cfg


@pytest.mark.parametrize("last_layer, channels", [(18, 1280), (17, 320)])
def test_pyramid_of_faster_rcnn(last_layer, channels):
    net = build_backbone(rcnn_cfg(last_layer)).train()
    out = net(torch.randn(1, 3, 64, 128))
    assert {name: tuple(x.shape[1:]) for name, x in out.items()} == {
        **{"p2": (32, 16, 32), "p3": (32, 8, 16), "p4": (32, 4, 8)},
        **{"p5": (32, 2, 4), "p6": (32, 1, 2)},
    }
    assert torch.equal(out["p6"], out["p5"][:, :, ::2, ::2])
    assert net.fpn_lateral5.in_channels == channels and net.fpn_lateral2.in_channels == 24
    assert net.size_divisibility == 32
    sum(x.square().mean() for x in out.values()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_pyramid_of_maps_that_are_not_returned():
    cfg = rcnn_cfg()
    cfg.MODEL.MOBILENET_V2.OUT_FEATURES = ("res3", "res4", "res5")
    with pytest.raises(
        ValueError, match="IN_FEATURES is .'res2'.*MOBILENET_V2.OUT_FEATURES .'res3'"
    ):
        build_backbone(cfg)
    cfg = rcnn_cfg()
    cfg.MODEL.PIXEL_MEAN = [0.5]
    with pytest.raises(ValueError, match="MobileNetV2 takes 3 channels"):
        build_backbone(cfg)


@pytest.mark.parametrize(
    "kwargs, key",
    [
        ({"out_features": ("res6",)}, "OUT_FEATURES"),
        ({"out_features": ()}, "OUT_FEATURES"),
        ({"freeze_at": 6}, "FREEZE_AT"),
        ({"width_mult": 0.0}, "WIDTH_MULT"),
        ({"last_layer": 16}, "LAST_LAYER"),
    ],
)
def test_wrong_values_are_named(kwargs, key):
    with pytest.raises(ValueError, match=key):
        MobileNetV2(**kwargs)
