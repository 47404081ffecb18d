"""Sorting of channels: permutations that keep the function, importance in falling order."""

import pytest
import torch
from detectron2.layers import Conv2d
from torch import nn

from kd_d2.projects.jointdetnas.extraction import as_subnet
from kd_d2.projects.jointdetnas.sorting import ChannelGroup, channel_groups, sort_channels
from kd_d2.projects.jointdetnas.subnet import Subnet
from tests.projects.jointdetnas.elastic_cases import (
    assert_same_outputs,
    codes,
    image,
    outputs,
    supernet,
)

WIDE = ("d2-2-3-2_w5-5-5-5_n5_s5", "d1-2-2-1_w5-6-5-6_n6_s5", "d2-1-1-2_w6-5-6-5_n5_s6")


def predictions(model):
    """RPN logits and deltas of all levels, classes and deltas of the box predictor."""
    values = outputs(model, image())
    return values[9:19] + values[20:]


def test_supernet_computes_what_it_did():
    cfg, net = supernet()
    before = predictions(net.model)
    state = {k: v.clone() for k, v in net.model.state_dict().items()}
    assert sort_channels(net) > 500
    assert_same_outputs(predictions(net.model), before, rtol=1e-5)
    changed = {k for k, v in net.model.state_dict().items() if not torch.equal(v, state[k])}
    # every tensor of the elastic part, but the counters and what has no elastic side
    fixed = {k for k in state if "tracked" in k or "roi_heads.box_head.fc2" in k}
    fixed |= {k for k in state if k.startswith("roi_heads.box_predictor")}
    fixed |= {"roi_heads.box_head.fc1.bias"}
    fixed |= {k for k in state if k.endswith(("logits.bias", "anchor_deltas.bias"))}
    assert changed == set(state) - fixed


def test_every_group_is_in_falling_order_and_a_second_sort_changes_nothing():
    cfg, net = supernet()
    groups = {group.name: group for group in channel_groups(net)}
    assert len(groups) == 1 + 2 * 9 + 4 + 3
    assert any((g.importance().diff() > 0).any() for g in groups.values())
    sort_channels(net)
    for group in groups.values():
        assert (group.importance().diff() <= 1e-9).all(), group.name
    state = {k: v.clone() for k, v in net.model.state_dict().items()}
    assert sort_channels(net) == 0
    assert all(torch.equal(state[k], v) for k, v in net.model.state_dict().items())


def test_kept_widths_keep_their_subnets():
    cfg, net = supernet()
    before = {}
    for code in (*WIDE, str(as_subnet("largest", cfg))):
        net.set_active(code)
        before[code] = predictions(net.model)
    net.set_active(as_subnet("smallest", cfg))
    smallest = predictions(net.model)
    net.set_max()
    assert sort_channels(net, (5,)) > 100
    for code, values in before.items():
        net.set_active(code)
        assert_same_outputs(predictions(net.model), values, rtol=1e-5)
    for group in channel_groups(net):
        border = group.standard * 5 // 4
        importance = group.importance()
        assert (importance[:border].diff() <= 1e-9).all(), group.name
        assert (importance[border:].diff() <= 1e-9).all(), group.name
    # narrower ones now have other channels
    net.set_active(as_subnet("smallest", cfg))
    assert not torch.allclose(predictions(net.model)[-1], smallest[-1], rtol=1e-2)


def test_without_kept_widths_narrow_subnets_change():
    cfg, net = supernet()
    net.set_active(WIDE[0])
    before = predictions(net.model)
    sort_channels(net)
    assert not torch.allclose(predictions(net.model)[-1], before[-1], rtol=1e-2)


def test_importance_and_permutation_by_hand():
    writer, reader = Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1)
    linear = nn.Linear(6, 1)  # two numbers of each channel
    writer.weight.data[:, 0, 0, 0] = torch.tensor([10.0, 20.0, 30.0])
    reader.weight.data[:, :, 0, 0] = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.25]])
    linear.weight.data = torch.tensor([[0.0, 1.0, -1.0, 1.0, 0.5, 0.0]])
    group = ChannelGroup("by hand", 2, [writer], [reader, linear])
    assert group.importance().tolist() == [1 + 1, 3 + 2, 0.75 + 0.5]
    group.permute(torch.tensor([1, 0, 2]))
    assert writer.weight.flatten().tolist() == [20, 10, 30]
    assert reader.weight[0].flatten().tolist() == [-2, 1, 0.5]
    assert linear.weight.flatten().tolist() == [-1, 1, 0, 1, 0.5, 0]


@pytest.mark.parametrize("keep", [(6,), (0,), (5, 7)])
def test_widths_that_cannot_be_kept_name_their_key(keep):
    with pytest.raises(ValueError, match="SORT_KEEP_WIDTHS"):
        sort_channels(supernet()[1], keep)


def test_sorting_prefers_what_is_read():
    """Zeroing what reads a channel makes it the last one, and a subnet loses nothing."""
    cfg, net = supernet()
    with torch.no_grad():
        for group in channel_groups(net):
            dead = torch.arange(0, group.width, 3)  # a third: less than what 1.0 of 1.5 leaves out
            for reader in group.readers:
                reader.weight.data.view(reader.weight.shape[0], group.width, -1)[:, dead] = 0
    before = predictions(net.model)
    sort_channels(net)
    net.set_active(Subnet((2, 2, 3, 2), (4,) * 4, 4, 4))
    assert_same_outputs(predictions(net.model), before, rtol=1e-5)
    assert len(codes(cfg, 1)) == 3
