"""Channel pruning: the ranking by hand, floors, ties, groups, and the whole action."""

import pytest
import torch

from kd_d2.projects.jointdetnas import Action, parse, resolve
from kd_d2.projects.jointdetnas.channel_pruning import (
    ChannelPruning,
    _Ranked,
    least_important,
    rank_channels,
)
from tests.fixtures import tiny_cfg
from tests.projects.jointdetnas.cases import (
    ALL,
    BASIC,
    BOTTLENECK,
    MOVED,
    STEM,
    bottom_up,
    images,
    pyramid,
    relative_difference,
    student,
)


def pruning(root=BOTTLENECK, percent=0.2, floor=0.25, min_channels=1):
    return ChannelPruning(
        root=parse(root, STEM), percent=percent, floor=floor, min_channels=min_channels
    )


def ranked(gammas):
    """One conv per entry, in blocks of stage 1."""
    return [
        _Ranked(value, (0, block, 0, index), ((0, block, 0),), (index,))
        for block, values in enumerate(gammas)
        for index, value in enumerate(values)
    ]


A, B = (0, 0, 0), (0, 1, 0)


@pytest.mark.parametrize("quota", [4, 5, 8])
def test_ranking_and_floors_by_hand(quota):
    """A keeps {2, 3} and B {1, 3}; more than 4 cannot go, because both are at their floor of 2."""
    gammas = [(0.1, 0.2, 0.9, 1.0), (0.05, 0.3, 0.15, 0.8)]
    removed = least_important(ranked(gammas), {A: 4, B: 4}, {A: 2, B: 2}, quota)
    assert {k: sorted(v) for k, v in removed.items()} == {A: [0, 1], B: [0, 2]}


def test_an_entry_at_its_floor_is_passed_over():
    gammas = [(0.1, 0.2, 0.3), (0.4, 0.5, 0.6)]
    removed = least_important(ranked(gammas), {A: 3, B: 3}, {A: 2, B: 1}, 3)
    assert removed == {A: [0], B: [0, 1]}
    assert least_important(ranked(gammas), {A: 3, B: 3}, {A: 0, B: 0}, 0) == {}


def test_ties_go_by_place():
    shuffled = ranked([(1.0, 1.0), (1.0, 1.0)])[::-1]
    removed = least_important(shuffled, {A: 2, B: 2}, {A: 0, B: 0}, 3)
    assert {k: sorted(v) for k, v in removed.items()} == {A: [0, 1], B: [0]}


@torch.no_grad()
def set_gammas(model, value):
    for name, module in model.named_modules():
        if name.startswith("backbone.bottom_up") and name.endswith(".norm"):
            module.weight.fill_(value)


def test_ties_over_a_network_in_the_order_of_the_encoding():
    """Equal gammas: first the convs of the first block, then the stream it starts."""
    model = student(BOTTLENECK)
    set_gammas(model, -0.5)
    # 149 + 104 rankable channels: (4+5+16)+(6+7)+... ; 10 of them
    count = parse(BOTTLENECK, STEM).num_rankable_channels
    action = pruning(percent=10 / count, floor=0.25, min_channels=2)
    pruned = action.apply(model, Action("ChannelPruning"))
    # 4 -> 2 and 5 -> 2 (floors), then 5 of the stream of 16 (floor 4)
    text = BOTTLENECK.replace("[(4,5,16)-(6,7,16)]", "[(2,2,11)-(6,7,11)]")
    assert str(bottom_up(pruned).architecture) == text
    old, new = (m.backbone.state_dict() for m in (model, pruned))
    key = "bottom_up.res2.0.conv3.weight"
    assert torch.equal(new[key], old[key][5:][:, 3:])


@pytest.mark.parametrize("name", ["r18", "r50", "r101"])
def test_number_of_entries_is_that_of_rankable_channels(name):
    with torch.device("meta"):
        from kd_d2.projects.jointdetnas import MorphResNet

        body = MorphResNet(resolve(name))
    body = body.to_empty(device="cpu")
    assert len(rank_channels(body)) == resolve(name).num_rankable_channels


def test_keys_are_the_inner_norms_and_the_projections():
    """Every other gamma may change without changing the ranking."""
    model = student(MOVED)
    body = bottom_up(model)
    before = rank_channels(body)
    values = {entry.place: entry.magnitude for entry in before}
    assert len(before) == len(values) == body.architecture.num_rankable_channels
    # magnitudes, not signed values, and each of its own channel
    for place, gamma in {
        (0, 1, 0, 3): body.res2[1].conv1.norm.weight[3],
        (2, 1, 1, 8): body.res4[1].conv2.norm.weight[8],
        (3, 1, 2, 30): body.res5[1].shortcut.norm.weight[30],
        (2, 0, 2, 5): body.res4[0].shortcut.norm.weight[5],
    }.items():
        assert values[place] == abs(gamma.item())
    assert any(g.item() < 0 for g in body.res4[1].conv2.norm.weight)
    with torch.no_grad():
        for position in body.architecture.positions:
            body.block_at(position).conv3.norm.weight.zero_()
        body.stem.conv1.norm.weight.zero_()
    assert rank_channels(body) == before


def test_the_stream_of_the_stem_is_not_pruned():
    model = student(BASIC)
    set_gammas(model, 0.5)
    pruned = pruning(BASIC, percent=0.99, floor=0.0).apply(model, Action("ChannelPruning"))
    arch = bottom_up(pruned).architecture
    assert [s.width for s in arch.streams] == [8, 1, 1, 1]
    assert {b.channels[0] for blocks in arch.stages for b in blocks} == {1}


def test_the_smallest_of_the_whole_network_go():
    """Against a plain sort of all keys: kept channels have larger weights than removed ones."""
    model = student(MOVED)
    action = pruning(MOVED, percent=0.1, floor=0.0)
    pruned = action.apply(model, Action("ChannelPruning"))
    old, new = bottom_up(model).architecture, bottom_up(pruned).architecture
    count = round(0.1 * old.num_rankable_channels)
    assert new.num_rankable_channels == old.num_rankable_channels - count
    magnitudes = sorted(e.magnitude for e in rank_channels(bottom_up(model)))
    left = sorted(e.magnitude for e in rank_channels(bottom_up(pruned)))
    assert left == pytest.approx(magnitudes[count:])
    # the parent is as it was, and both detect
    assert str(old) == MOVED
    assert pyramid(pruned, images())["p2"].shape == pyramid(model, images())["p2"].shape


def test_dead_channels_go_first_and_nothing_changes():
    model = student(BOTTLENECK)
    body = bottom_up(model)
    with torch.no_grad():
        dead = [(body.res3[1].conv1, [0, 2]), (body.res4[0].conv2, [3]), (body.res5[0].conv1, [8])]
        for conv, channels in dead:
            conv.norm.weight[channels] = 0
            conv.norm.bias[channels] = -0.1
    count = body.architecture.num_rankable_channels
    pruned = pruning(percent=4 / count).apply(model, Action("ChannelPruning"))
    assert relative_difference(pyramid(model, images()), pyramid(pruned, images())) < 1e-5
    assert str(bottom_up(pruned).architecture) == BOTTLENECK.replace(
        "(7,8,24)", "(5,8,24)"
    ).replace("(8,7,28)", "(8,6,28)").replace("(9,8,36)", "(8,8,36)")


def test_groups_go_whole_by_their_mean():
    model = student(ALL["grouped"])
    set_gammas(model, 1.0)
    norms = [conv.norm for conv in bottom_up(model).res2[0].convs[:2]]
    with torch.no_grad():
        # means over both convs by group: 0.55, 0.5, 0.525, 1
        norms[0].weight.copy_(torch.tensor([0.1, 1, -0.5, 0.5, 0.05, 1, 1, 1]))
        norms[1].weight.copy_(torch.tensor([0.1, 1, 0.5, 0.5, 0.05, 1, 1, 1]))
    entries = [e for e in rank_channels(bottom_up(model)) if e.place[:2] == (0, 0)][:4]
    assert [e.magnitude for e in entries] == pytest.approx([0.55, 0.5, 0.525, 1])
    total = len(rank_channels(bottom_up(model)))
    action = pruning(ALL["grouped"], percent=2 / total)
    pruned = action.apply(model, Action("ChannelPruning"))
    block = bottom_up(pruned).architecture.block((0, 0))
    assert block.channels == (4, 4, 16) and block.groups == 2
    kept = bottom_up(pruned).res2[0].conv1.norm.weight
    assert torch.equal(kept, norms[0].weight[[0, 1, 6, 7]])
    # a floor inside of a group stops at the group before
    floor = pruning(ALL["grouped"], percent=2 / total, floor=0.75)
    block = bottom_up(floor.apply(model, Action("ChannelPruning"))).architecture.block((0, 0))
    assert block.channels[:2] == (6, 6)


def test_floors_are_parts_of_the_root():
    action = pruning(BOTTLENECK, floor=0.5, min_channels=3)
    # deeper than the root: the last block of the root's stage counts; moved blocks as their stage
    arch = parse("[(9,9,16)-(9,9,16)-(9,9,16)],[(9,9,24)],[(9,9,28)],[(9,9,28)-(9,9,36)]", STEM)
    floors = action.floors(arch)
    assert [floors[(0, b, 0)] for b in range(3)] == [3, 3, 3]
    assert [floors[(0, b, 1)] for b in range(3)] == [3, 3, 3]  # 5 // 2, 7 // 2
    assert floors[(3, 0, 0)] == 4 and floors[(3, 1, 1)] == 3
    assert [floors[i] for i in (1, 2, 3, 4)] == [8, 12, 14, 18]
    assert 0 not in floors  # the stem


def test_legal_while_a_channel_is_above_its_floor():
    everything = pruning(MOVED, floor=0.0, min_channels=1)
    assert everything.choices(parse(MOVED, STEM)) == [Action("ChannelPruning")]
    assert pruning(MOVED, min_channels=99).choices(parse(MOVED, STEM)) == []
    # exactly one channel above
    text = "[(4,4,8)-(5,4,8)],[(4,4,8)],[(4,4,8)],[(4,4,8)]"
    assert pruning(text, floor=0.0, min_channels=4).choices(parse(text, STEM)) != []
    at_floor = text.replace("(5,", "(4,")
    assert pruning(text, floor=0.0, min_channels=4).choices(parse(at_floor, STEM)) == []
    grouped = "[(8,8,8)g2],[(4,4,8)],[(4,4,8)],[(4,4,8)]"
    assert pruning(grouped, floor=0.0, min_channels=5).choices(parse(grouped, STEM)) == []
    assert pruning(grouped, floor=0.0, min_channels=4).choices(parse(grouped, STEM)) != []


def test_norms_without_weights_cannot_be_ranked():
    model = student(MOVED, **{"MODEL.BACKBONE.FREEZE_AT": 2})
    with pytest.raises(ValueError, match=r"\(0, 0, 0\).*FREEZE_AT to 0"):
        pruning(MOVED).apply(model, Action("ChannelPruning"))


def test_from_config():
    cfg = tiny_cfg("GeneralizedRCNN")
    action = ChannelPruning(cfg, resolve("r50"))
    assert (action.percent, action.floor, action.min_channels) == (0.05, 0.125, 8)
    floors = action.floors(resolve("searched_r50"))
    # an eighth of 64, 256 and 512
    assert floors[(0, 0, 0)] == 8 and floors[1] == 32 and floors[(3, 0, 1)] == 64


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"percent": 0.0}, r"PERCENT must be in \(0, 1\), got 0.0"),
        ({"percent": 1.0}, r"PERCENT must be in \(0, 1\), got 1.0"),
        ({"floor": 1.0}, r"FLOOR must be in \[0, 1\), got 1.0"),
        ({"min_channels": 0}, "MIN_CHANNELS must be positive, got 0"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        pruning(**arguments)
