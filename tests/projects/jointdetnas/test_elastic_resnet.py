"""Elastic layers and networks: prefixes of the weights, skipped blocks, gradients."""

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from kd_d2.projects.jointdetnas.elastic_layers import (
    ElasticBatchNorm2d,
    ElasticConv2d,
    ElasticLinear,
)
from kd_d2.projects.jointdetnas.subnet import Subnet
from kd_d2.projects.jointdetnas.supernet import Supernet
from tests.fixtures import tiny_batch, tiny_model
from tests.projects.jointdetnas.elastic_cases import (
    assert_same_outputs,
    codes,
    elastic_cfg,
    image,
    outputs,
    supernet,
)


# ------------------------------------------------------------------------------------- layers
def test_conv_reads_and_writes_the_leading_channels():
    torch.manual_seed(0)
    conv = Conv2d(6, 8, 3, padding=1, stride=2, norm=ElasticBatchNorm2d(8, synchronised=False))
    conv.activation = nn.ReLU()
    elastic = ElasticConv2d.of(conv)
    assert elastic.weight is conv.weight and elastic.bias is conv.bias
    elastic.norm.running_mean.normal_()
    elastic.active_out = 5
    x = torch.randn(2, 4, 9, 9)
    plain = nn.Conv2d(4, 5, 3, padding=1, stride=2)
    plain.weight.data, plain.bias.data = conv.weight.data[:5, :4], conv.bias.data[:5]
    norm = nn.BatchNorm2d(5)
    norm.running_mean.copy_(elastic.norm.running_mean[:5])
    expected = norm.train()(plain(x)).relu()
    before = elastic.norm.running_mean.clone()
    torch.testing.assert_close(elastic.train()(x), expected)
    # training tracks the active channels only, as the plain norm does
    torch.testing.assert_close(elastic.norm.running_mean[:5], norm.running_mean)
    torch.testing.assert_close(elastic.norm.running_var[:5], norm.running_var)
    assert torch.equal(elastic.norm.running_mean[5:], before[5:])
    torch.testing.assert_close(elastic.eval()(x), norm.eval()(plain(x)).relu())


def test_replacing_a_layer_draws_no_random_number():
    state = torch.get_rng_state()
    conv = nn.Conv2d(4, 4, 1)
    after = torch.get_rng_state()
    ElasticConv2d.of(conv), ElasticLinear.of(nn.Linear(4, 4, device="meta"))
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(state, after)


def test_linear_reads_the_leading_inputs():
    linear = nn.Linear(8, 3)
    elastic, x = ElasticLinear.of(linear), torch.randn(2, 5)
    torch.testing.assert_close(elastic(x), x @ linear.weight[:, :5].T + linear.bias)
    elastic(x).sum().backward()
    assert linear.weight.grad[:, 5:].abs().sum() == 0


# ----------------------------------------------------------------------------------- networks
def test_micro_supernet_has_the_expected_parameters():
    """831 371 with the specification's micro heads: FC 64, 7x7 cells, 3 classes, 3 anchors."""
    overrides = {
        "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.FPN.NORM": "",
    }
    model = build_model(elastic_cfg(**overrides))
    assert sum(p.numel() for p in model.parameters()) == 831371


def test_all_parts_shrink():
    cfg, net = supernet()
    net.set_active("d1-2-2-1_w4-5-6-4_n5_s4")
    features = net.model.backbone.bottom_up(image())
    assert [x.shape[1] for x in features.values()] == [32, 80, 192, 256]
    assert [x.shape[-1] for x in features.values()] == [24, 12, 6, 3]
    pyramid = net.model.backbone(image())
    assert {x.shape[1] for x in pyramid.values()} == {40}
    assert net.model.backbone.output_shape()["p2"].channels == 48
    calls = []
    for name, module in net.model.backbone.bottom_up.named_modules():
        if name.count(".") == 1 and name.startswith("res"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    net.model.backbone(image())
    assert calls == ["res2.0", "res3.0", "res3.1", "res4.0", "res4.1", "res5.0"]
    net.set_max()
    assert net.active == net.geometry.largest
    assert net.model.backbone(image())["p2"].shape[1] == 48


def test_subnets_differ_and_the_supernet_comes_back():
    cfg, net = supernet()
    before = outputs(net.model, image())
    seen = []
    for subnet in codes(cfg, 4):
        net.set_active(subnet)
        seen.append(outputs(net.model, image())[-2])
    for i, a in enumerate(seen):
        assert all(not torch.allclose(a, b) for b in seen[:i])
    net.set_max()
    for a, b in zip(before, outputs(net.model, image())):
        assert torch.equal(a, b)


def test_a_slice_is_the_supernet_with_zeros():
    """Independent of any extraction: what is not active might as well be zero."""
    cfg, net = supernet(norm="")
    net.set_active("d2-2-3-2_w6-6-6-6_n4_s6")
    sliced = outputs(net.model, image())
    net.set_max()
    with torch.no_grad():
        for conv in (*net.model.backbone.lateral_convs, *net.model.backbone.output_convs):
            conv.weight[32:], conv.bias[32:] = 0, 0
        rpn = net.model.proposal_generator.rpn_head.conv
        rpn.weight[32:], rpn.bias[32:] = 0, 0
    whole = outputs(net.model, image())
    narrow = [x[:, :32] if x.dim() == 4 and x.shape[1] == 48 else x for x in whole]
    # res2 has 48 channels as well, and they all stay
    narrow[0] = whole[0]
    assert_same_outputs(sliced, narrow, rtol=1e-5)


def test_training_reaches_active_slices_only():
    cfg, net = supernet()
    net.model.train()
    net.set_active("d1-2-2-1_w4-5-6-4_n4_s5")
    batch = tiny_batch(sizes=((64, 96),))
    optimizer = torch.optim.SGD(net.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    with EventStorage():
        sum(net.model(batch).values()).backward()
    grads = {name: p.grad for name, p in net.model.named_parameters()}
    skipped = [n for n in grads if n.startswith("backbone.bottom_up.res") and ".1." in n]
    skipped = [n for n in skipped if not n.startswith("backbone.bottom_up.res3")]
    skipped = [n for n in skipped if not n.startswith("backbone.bottom_up.res4")]
    skipped += [n for n in grads if n.startswith("backbone.bottom_up.res4.2.")]
    assert len(skipped) == 3 * 9
    for name, grad in grads.items():
        assert (grad is None) == (name in skipped), name
    conv1 = grads["backbone.bottom_up.res3.1.conv1.weight"]
    assert conv1[:20, :80].abs().sum() > 0
    assert conv1[20:].abs().sum() == 0 and conv1[:, 80:].abs().sum() == 0
    fc1 = grads["roi_heads.box_head.fc1.weight"]
    assert fc1[:, : 32 * 25].abs().sum() > 0 and fc1[:, 32 * 25 :].abs().sum() == 0
    optimizer.step()
    after = net.model.state_dict()
    for name in skipped:
        # not even weight decay
        assert torch.equal(after[name], before[name]), name
    # outside the slice weight decay alone, as in Once-for-All
    rows = after["backbone.bottom_up.res3.1.conv1.weight"][20:]
    torch.testing.assert_close(rows, 0.99 * before["backbone.bottom_up.res3.1.conv1.weight"][20:])


def test_training_and_inference_on_odd_sizes_without_ground_truth():
    cfg, net = supernet()
    for subnet in codes(cfg, 1):
        net.set_active(subnet)
        for counts in ((2, 1), (0, 0)):
            batch = tiny_batch(sizes=((97, 131), (64, 70)), num_gt=counts)
            net.model.train()
            with EventStorage():
                losses = net.model(batch)
            assert all(torch.isfinite(value) for value in losses.values())
            net.model.eval()
            with torch.no_grad():
                assert len(net.model(batch)) == 2


def test_autocast_is_finite():
    cfg, net = supernet()
    net.set_active(codes(cfg, 0)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = net.model.train().backbone(image(num=2))
    assert all(torch.isfinite(x).all() for x in features.values())


# ------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.BACKBONE.FREEZE_AT", 2),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True),
        ("MODEL.RESNETS.NUM_GROUPS", 2),
        ("MODEL.RESNETS.RES5_DILATION", 2),
        ("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]),
        ("MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
        ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]),
        ("MODEL.RESNETS.NORM", "FrozenBN"),
        ("MODEL.FPN.NORM", "GN"),
        ("MODEL.RPN.CONV_DIMS", [16]),
        ("MODEL.ROI_BOX_HEAD.NUM_CONV", 1),
    ],
)
def test_what_cannot_be_elastic_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        build_model(elastic_cfg(**{key: value}))


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.RPN.HEAD_NAME", "StandardRPNHead"),
        ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
    ],
)
def test_parts_that_are_not_elastic_are_named(key, value):
    cfg = elastic_cfg(**{key: value})
    with pytest.raises(ValueError, match=f"{key} of a supernet must be 'Elastic"):
        Supernet.from_config(cfg, build_model(cfg))
    with pytest.raises(ValueError, match="MODEL.BACKBONE.NAME of a supernet"):
        Supernet.from_config(cfg, tiny_model("GeneralizedRCNN"))


def test_subnets_of_another_pool_are_refused():
    _, net = supernet()
    with pytest.raises(ValueError, match="no part of the supernet d2-2-3-2_w6-6-6-6_n6_s6"):
        net.set_active(Subnet((3, 2, 3, 2), (6,) * 4, 6, 6))
    assert net.active == net.geometry.largest
