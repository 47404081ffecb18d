"""Pyramids: equality with Detectron2, P6 source, P7 ReLU, batch-norm modes."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import BasicStem

from kd_d2.config import get_cfg
from kd_d2.modeling.backbone import EvalStatsBatchNorm2d, ExtraLevels, use_eval_statistics


def resnet_cfg(name="build_kd_resnet_fpn_backbone", depth=18):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 64
    return cfg


def images(size=128):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_equals_detectron2s_retinanet_pyramid(depth):
    torch.manual_seed(0)
    reference = build_backbone(resnet_cfg("build_retinanet_resnet_fpn_backbone", depth)).eval()
    ours = build_backbone(resnet_cfg(depth=depth)).eval()
    assert list(ours.state_dict()) == list(reference.state_dict())
    ours.load_state_dict(reference.state_dict())
    assert ours.output_shape() == reference.output_shape()
    assert ours.size_divisibility == reference.size_divisibility == 32
    with torch.no_grad():
        expected, actual = reference(images()), ours(images())
    assert list(actual) == list(expected) == ["p3", "p4", "p5", "p6", "p7"]
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_p6_from_p5_and_p7_without_relu():
    cfg = resnet_cfg()
    cfg.MODEL.FPN.P6_SOURCE = "p5"
    cfg.MODEL.FPN.P7_RELU = False
    net = build_backbone(cfg).eval()
    top = net.top_block
    assert top.p6.weight.shape[1] == 64  # pyramid channels, not the 512 of res5
    with torch.no_grad():
        out = net(images())
    torch.testing.assert_close(out["p6"], top.p6(out["p5"]))
    torch.testing.assert_close(out["p7"], top.p7(out["p6"]))
    assert (out["p6"] < 0).any()  # so that the ReLU would have mattered


def test_p7_relu_by_hand():
    # P6 = x (1x1 input meets only the centre tap), P7 = 2 * P6 or 2 * relu(P6).
    for relu, expected in ((True, 0.0), (False, -6.0)):
        top = ExtraLevels(1, 1, "res5", relu)
        for conv, factor in ((top.p6, 1.0), (top.p7, 2.0)):
            torch.nn.init.zeros_(conv.weight)
            torch.nn.init.zeros_(conv.bias)
            conv.weight.data[0, 0, 1, 1] = factor
        p6, p7 = top(torch.full((1, 1, 1, 1), -3.0))
        assert (p6.item(), p7.item()) == (-3.0, expected)


def test_gradients_reach_every_parameter():
    for source in ("c5", "p5"):
        cfg = resnet_cfg()
        cfg.MODEL.RESNETS.NORM = "BN"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.FPN.P6_SOURCE = source
        net = build_backbone(cfg).train()
        sum(x.square().mean() for x in net(images()).values()).backward()
        assert all(p.grad is not None for p in net.parameters())
        # Plain BN: statistics follow the data.
        assert net.bottom_up.stem.conv1.norm.running_mean.abs().sum() > 0


def test_eval_affine_keeps_statistics_and_trains_affine():
    cfg = resnet_cfg()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.BN_MODE = "eval_affine"
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    plain = cfg.clone()
    plain.MODEL.RESNETS.BN_MODE = ""
    net = build_backbone(cfg).train()
    assert list(net.state_dict()) == list(build_backbone(plain).state_dict())
    res = net.bottom_up
    for part in (res.stem, res.res2):  # frozen as Detectron2 does it
        norms = [m for m in part.modules() if isinstance(m, FrozenBatchNorm2d)]
        assert norms and not any(p.requires_grad for p in part.parameters())
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(isinstance(m, EvalStatsBatchNorm2d) and not m.training for m in norms)
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k}
    sum(x.square().mean() for x in net(images()).values()).backward()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert all(m.weight.grad is not None and m.bias.grad is not None for m in norms)


def test_eval_statistics_equal_batch_norm_in_eval():
    bn = torch.nn.BatchNorm2d(3, eps=1e-3, momentum=0.2)
    bn.running_mean.copy_(torch.tensor([1.0, 0.0, -1.0]))
    bn.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    torch.nn.init.uniform_(bn.weight)
    x = torch.randn(2, 3, 4, 4)
    expected = bn.eval()(x)
    ours = use_eval_statistics(bn)
    assert ours.weight is bn.weight and ours.eps == 1e-3
    assert torch.equal(ours.train()(x), expected)
    assert int(ours.num_batches_tracked) == 0
    stem = use_eval_statistics(BasicStem(3, 8, norm="BN"))
    assert isinstance(stem.conv1.norm, EvalStatsBatchNorm2d)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.FPN.P6_SOURCE", "c6", "P6_SOURCE"),
        ("MODEL.FPN.IN_FEATURES", ["res3", "res9"], "IN_FEATURES"),
        ("MODEL.FPN.IN_FEATURES", [], "IN_FEATURES"),
        ("MODEL.RESNETS.BN_MODE", "frozen", "BN_MODE"),
        ("MODEL.RESNETS.BN_MODE", "eval_affine", "NORM is 'FrozenBN'"),
    ],
)
def test_wrong_keys_are_named(key, value, message):
    cfg = resnet_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)


def test_default_keys_are_detectron2s():
    cfg = get_cfg()
    assert (cfg.MODEL.FPN.P6_SOURCE, cfg.MODEL.FPN.P7_RELU) == ("c5", True)
    assert cfg.MODEL.RESNETS.BN_MODE == ""
