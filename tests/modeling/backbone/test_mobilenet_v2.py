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


@pytest.mark.parametrize(
    "kwargs, key",
    [
        ({"out_features": ("res6",)}, "OUT_FEATURES"),
        ({"out_features": ()}, "OUT_FEATURES"),
        ({"freeze_at": 6}, "FREEZE_AT"),
        ({"width_mult": 0.0}, "WIDTH_MULT"),
    ],
)
def test_wrong_values_are_named(kwargs, key):
    with pytest.raises(ValueError, match=key):
        MobileNetV2(**kwargs)
