"""Swin: equality with Detectron2's class, drop path, freezing, pyramid."""

import pytest
import torch
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import SwinTransformer
from torchvision.ops import StochasticDepth

from kd_d2.config import get_cfg
from kd_d2.modeling.backbone import Swin

SMALL = dict(embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), window_size=4)


def small_cfg():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_swin_fpn_backbone"
    cfg.MODEL.SWIN.EMBED_DIM = 12
    cfg.MODEL.SWIN.DEPTHS = (1, 1, 2, 1)
    cfg.MODEL.SWIN.NUM_HEADS = (1, 2, 3, 4)
    cfg.MODEL.SWIN.WINDOW_SIZE = 4
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    return cfg


def test_features_are_detectron2s():
    torch.manual_seed(0)
    reference = SwinTransformer(out_indices=(1, 2, 3), drop_path_rate=0.0, **SMALL).eval()
    ours = Swin(**SMALL).eval()
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 96, 70)  # widths that need padding inside
    with torch.no_grad():
        expected, actual = reference(x), ours(x)
    assert list(actual) == ["res3", "res4", "res5"]
    for a, b in zip(actual.values(), expected.values()):
        assert torch.equal(a, b)


def test_swin_t_numbers():
    shapes = Swin().output_shape()
    assert {k: (v.channels, v.stride) for k, v in shapes.items()} == {
        "res3": (192, 8),
        "res4": (384, 16),
        "res5": (768, 32),
    }
    assert Swin().size_divisibility == 32


@pytest.mark.parametrize("source, channels", [("c5", 96), ("p5", 32)])
def test_pyramid(source, channels):
    cfg = small_cfg()
    cfg.MODEL.FPN.P6_SOURCE = source
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.0
    net = build_backbone(cfg).train()
    assert net.top_block.p6.weight.shape[1] == channels
    out = net(torch.randn(2, 3, 128, 128))
    assert [tuple(x.shape[1:]) for x in out.values()] == [(32, s, s) for s in (16, 8, 4, 2, 1)]
    sum(x.square().mean() for x in out.values()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_drop_path_rates_grow_linearly_and_are_off_in_eval():
    net = build_backbone(small_cfg()).bottom_up  # 5 blocks, 0.2 at the last
    blocks = [block for layer in net.layers for block in layer.blocks]
    rates = [getattr(block.drop_path, "p", 0.0) for block in blocks]
    torch.testing.assert_close(rates, [0.0, 0.05, 0.1, 0.15, 0.2])
    assert sum(isinstance(block.drop_path, StochasticDepth) for block in blocks) == 4
    x = torch.randn(1, 3, 64, 64)
    plain = Swin(drop_path_rate=0.0, **SMALL).eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(net.eval()(x)["res5"], plain(x)["res5"])


def test_frozen_stages_stay_in_eval_mode():
    net = Swin(freeze_at=2, **SMALL).train()
    assert not net.patch_embed.training and not net.layers[0].training and net.layers[1].training
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name, _ in net.named_parameters() if name.startswith(("patch_embed", "layers.0."))
    }


def test_stages_beyond_the_last_output_are_not_built():
    net = Swin(out_features=("res2", "res3"), **SMALL)
    assert len(net.layers) == 2 and net.size_divisibility == 8


@pytest.mark.parametrize(
    "kwargs, key",
    [
        ({"out_features": ("p3",)}, "OUT_FEATURES"),
        ({"depths": (2, 2)}, "DEPTHS"),
        ({"num_heads": (5, 6, 12, 24)}, "NUM_HEADS"),
        ({"drop_path_rate": 1.0}, "DROP_PATH_RATE"),
        ({"freeze_at": 6}, "FREEZE_AT"),
    ],
)
def test_wrong_values_are_named(kwargs, key):
    with pytest.raises(ValueError, match=key):
        Swin(**kwargs)
