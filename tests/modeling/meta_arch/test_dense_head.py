"""The two-tower head: parts and whole agree, initial values, user errors."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from kd_d2.modeling.meta_arch import DenseHead

LEVELS = [ShapeSpec(channels=32, stride=8), ShapeSpec(channels=32, stride=16)]


def _head(**kwargs):
    torch.manual_seed(0)
    return DenseHead(**{"input_shape": LEVELS, "num_classes": 3, "num_convs": 2, **kwargs})


def _features(channels=32):
    torch.manual_seed(1)
    return [torch.randn(2, channels, 6, 5), torch.randn(2, channels, 3, 3)]


@pytest.mark.parametrize("centerness_on", ["none", "reg", "cls"])
@pytest.mark.parametrize(
    "norm, num_convs, use_scale", [("GN", 2, True), ("", 1, False), ("", 0, True)]
)
def test_parts_equal_the_whole(centerness_on, norm, num_convs, use_scale):
    head = _head(
        norm=norm,
        num_convs=num_convs,
        use_scale=use_scale,
        centerness_on=centerness_on,
        num_anchors=2,
        box_dim=5,
    )
    if use_scale:
        with torch.no_grad():
            head.scales[0].scale.fill_(2.0)
            head.scales[1].scale.fill_(3.0)
    features = _features()
    outputs = head(features)
    names = ("cls", "box", "ctr")[: len(outputs)]
    assert len(outputs) == (2 if centerness_on == "none" else 3)
    for level, feature in enumerate(features):
        parts = {}
        for branch in head.branches:
            parts.update(head.predict(branch, head.tower(branch)(feature), level))
        assert sorted(parts) == sorted(names)
        for name, output in zip(names, outputs):
            assert torch.equal(parts[name], output[level])
        size = feature.shape[-2:]
        assert parts["cls"].shape == (2, 6, *size)
        assert parts["box"].shape == (2, 10, *size)
        if use_scale:
            tower = head.tower("box")(feature)
            torch.testing.assert_close(parts["box"], head.bbox_pred(tower) * (2.0 + level))
    if centerness_on != "none":
        branch = {"reg": "box", "cls": "cls"}[centerness_on]
        assert "ctr" in head.predict(branch, head.tower(branch)(features[0]), 0)
        assert outputs[2][0].shape == (2, 2, 6, 5)


@pytest.mark.parametrize("norm, modules_per_stage", [("GN", 3), ("", 2)])
def test_structure_of_the_towers(norm, modules_per_stage):
    head = _head(norm=norm, num_convs=4, conv_dim=64)
    assert head.num_stages == 4
    for branch in head.branches:
        tower = head.tower(branch)
        assert len(tower) == 4 * modules_per_stage
        for stage in range(4):
            conv, *_, relu = tower[stage * modules_per_stage : (stage + 1) * modules_per_stage]
            assert conv.kernel_size == (3, 3) and conv.out_channels == 64
            assert (conv.bias is None) == bool(norm)
            assert isinstance(relu, nn.ReLU) and not relu.inplace
    assert head.tower("cls") is head.cls_subnet and head.tower("box") is head.bbox_subnet
    if norm:
        assert head.cls_subnet[1].num_groups == 32


def test_initial_values():
    head = _head(num_convs=4, conv_dim=64, prior_prob=0.01)
    torch.testing.assert_close(head.cls_score.bias, torch.full((3,), -4.595120))
    assert head.bbox_pred.bias.abs().max() == 0
    weights = torch.cat([m.weight.flatten() for m in head.modules() if isinstance(m, nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(weights.mean().item()) < 1e-4
    assert [s.scale.item() for s in head.scales] == [1.0, 1.0]
    score = head([torch.zeros(1, 32, 2, 2)] * 2)[0][0].sigmoid()
    assert score.mean().item() == pytest.approx(0.01, rel=0.3)


def test_stages_do_not_overwrite_what_a_hook_recorded():
    head = _head(norm="GN")
    seen = []
    handles = [
        m.register_forward_hook(lambda _, __, out: seen.append((out, out._version)))
        for m in head.cls_subnet
    ]
    head(_features())
    for handle in handles:
        handle.remove()
    assert seen and all(out._version == version for out, version in seen)


def test_box_predictions_are_fp32_under_autocast():
    head = _head()
    with torch.autocast("cpu", torch.bfloat16):
        logits, boxes = head(_features())
    assert logits[0].dtype == torch.bfloat16 and boxes[0].dtype == torch.float32


def test_user_errors_name_the_values():
    head = _head()
    for call in (lambda: head.tower("reg"), lambda: head.predict("reg", _features()[0], 0)):
        with pytest.raises(ValueError, match="'cls', 'box'.*'reg'"):
            call()
    with pytest.raises(ValueError, match="channels"):
        _head(input_shape=[LEVELS[0], ShapeSpec(channels=64, stride=16)])
    with pytest.raises(ValueError, match="PRIOR_PROB.*1.0"):
        _head(prior_prob=1.0)
    with pytest.raises(ValueError, match="NUM_CONVS.*-1"):
        _head(num_convs=-1)
    with pytest.raises(ValueError, match="centerness_on.*'box'"):
        _head(centerness_on="box")
    with pytest.raises(ValueError, match="'groups'"):
        _head(norm="groups")
    with pytest.raises(ValueError, match="'GN'.*CONV_DIM 48"):
        _head(conv_dim=48)
