"""Layer pruning and add-layer."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from kd_d2.projects.jointdetnas import Action, parse, resolve
from kd_d2.projects.jointdetnas.add_layer import AddLayer
from kd_d2.projects.jointdetnas.layer_pruning import LayerPruning, without_block
from tests.fixtures import tiny_batch, tiny_cfg
from tests.projects.jointdetnas.cases import (
    ALL,
    BASIC,
    BOTTLENECK,
    FORCED,
    MOVED,
    STEM,
    bottom_up,
    detections,
    images,
    pyramid,
    relative_difference,
    student,
)

PRUNE = Action("LayerPruning")


def layer_pruning(importance="sum", protect=3):
    return LayerPruning(importance=importance, protect=protect)


# ------------------------------------------------------------------------------- layer pruning
@pytest.mark.parametrize(
    "text, expected",
    [
        # not the first block of a stage, not the only one
        (BOTTLENECK, [(0, 1), (1, 1), (1, 2), (2, 1), (3, 1)]),
        # of basic blocks behind the stem the first one, too
        (BASIC, [(0, 0), (0, 1), (1, 1), (1, 2), (2, 1), (3, 1)]),
        # neither the identity at stride 2 nor the projection behind it
        (MOVED, [(0, 1), (1, 1), (2, 1), (3, 2)]),
        (FORCED, [(0, 1), (1, 2), (2, 1), (3, 1)]),
        ("[(8,8)],[(9,12)],[(9,16)],[(9,20)]", []),
    ],
)
def test_candidates(text, expected):
    architecture = parse(text, STEM)
    assert layer_pruning().candidates(architecture) == expected
    assert layer_pruning().choices(architecture) == ([PRUNE] if expected else [])


@torch.no_grad()
def set_parameters(model, values):
    for position, value in values.items():
        for parameter in bottom_up(model).block_at(position).parameters():
            parameter.fill_(value)


def test_the_smallest_legal_block_goes():
    model = student(BOTTLENECK)
    set_parameters(model, {p: 1.0 for p in bottom_up(model).architecture.positions})
    # smaller still are blocks that must stay
    set_parameters(model, {(1, 0): 0.0, (2, 0): 0.0, (3, 1): -0.01, (2, 1): 0.02})
    pruned = layer_pruning().apply(model, PRUNE)
    assert str(bottom_up(pruned).architecture) == BOTTLENECK.replace("-(7,6,36)", "")
    assert torch.equal(
        bottom_up(pruned).res5[0].conv1.weight, bottom_up(model).res5[0].conv1.weight
    )


def test_importance_by_hand():
    model = student(BASIC)
    set_parameters(model, {(0, 1): -2.0})
    # convs 8 -> 6 -> 8 of 3x3, two norms with weight and bias
    count = 9 * (8 * 6 + 6 * 8) + 2 * 6 + 2 * 8
    assert layer_pruning("sum").importance(model, (0, 1)) == 2.0 * count
    assert layer_pruning("mean").importance(model, (0, 1)) == 2.0


def test_sum_favours_small_blocks_and_mean_does_not():
    model = student(BASIC)
    set_parameters(model, {p: 1.0 for p in bottom_up(model).architecture.positions})
    set_parameters(model, {(3, 1): 0.9})
    by_sum = layer_pruning("sum").apply(model, PRUNE)
    by_mean = layer_pruning("mean").apply(model, PRUNE)
    assert bottom_up(by_sum).architecture.depths == (1, 3, 2, 2)
    # (6,8) is smaller than (8,8)
    assert str(bottom_up(by_sum).architecture).startswith("[(8,8)],")
    assert bottom_up(by_mean).architecture.depths == (2, 3, 2, 1)


def test_he_initialised_r18_loses_a_block_of_the_first_stage():
    """As the published R-18 did; the sums of stage 1 are about 3 600, of stage 4 about 79 500."""
    from kd_d2.projects.jointdetnas import MorphResNet

    torch.manual_seed(0)
    body = MorphResNet(resolve("r18"))
    norm = layer_pruning().importance
    assert norm(body, (0, 0)) == pytest.approx(3589, rel=0.05)
    assert norm(body, (3, 1)) == pytest.approx(79490, rel=0.05)
    pruned = layer_pruning().apply(body, PRUNE)
    assert pruned.architecture == resolve("searched_r18")


def test_equal_blocks_go_in_the_order_of_the_network():
    model = student("[(8,8)-(8,8)],[(8,12)-(8,12)],[(9,16)],[(9,20)]")
    set_parameters(model, {p: 0.5 for p in bottom_up(model).architecture.positions})
    with torch.no_grad():
        bottom_up(model).res2[1].conv1.weight[0, 0, 0, 0] = 0.25  # tells them apart, not smaller
        bottom_up(model).res2[1].conv1.weight[0, 0, 0, 1] = 0.75
    pruned = layer_pruning().apply(model, PRUNE)
    assert bottom_up(pruned).res2[0].conv1.weight[0, 0, 0, 0] == 0.25


@pytest.mark.parametrize("name", sorted(ALL))
def test_removing_a_block_that_adds_nothing_is_exact(name):
    model = student(ALL[name])
    architecture = bottom_up(model).architecture
    for position in layer_pruning().candidates(architecture):
        changed = without_block(model, position)
        assert relative_difference(pyramid(model, images()), pyramid(changed, images())) > 1e-3
        norm = bottom_up(model).block_at(position).convs[-1].norm
        with torch.no_grad():
            norm.weight.zero_()
            norm.bias.zero_()
    x = images()
    before = {mode: pyramid(model, x, mode) for mode in (False, True)}
    while layer_pruning().choices(bottom_up(model).architecture):
        model = layer_pruning().apply(model, PRUNE)
    assert len(bottom_up(model).architecture.positions) < len(architecture.positions)
    for mode, expected in before.items():
        assert relative_difference(expected, pyramid(model, x, mode)) == 0


def test_young_blocks_are_protected():
    model = student(MOVED)
    grown = AddLayer(max_depth=(9, 9, 9, 9)).apply(model, Action("AddLayer", 0))
    architecture = bottom_up(grown).architecture
    assert architecture.block((0, 2)).age == 0
    # the fresh block is by far the smallest
    norms = {p: layer_pruning().importance(grown, p) for p in architecture.positions}
    assert min(norms, key=norms.get) == (0, 2)
    for age in range(5):
        assert ((0, 2) in layer_pruning(protect=3).candidates(architecture)) == (age >= 3)
        architecture = architecture.older()
    assert (0, 2) in layer_pruning(protect=0).candidates(bottom_up(grown).architecture)
    assert (0, 2) not in layer_pruning().candidates(bottom_up(grown).architecture)
    pruned = layer_pruning().apply(grown, PRUNE)
    assert [b.age for b in bottom_up(pruned).architecture.stages[0]][-1] == 0


def test_nothing_to_remove_is_an_error():
    with pytest.raises(ValueError, match="no block of the student may be removed"):
        layer_pruning().apply(student("[(8,8,9)],[(9,9,12)],[(9,9,16)],[(9,9,20)]"), PRUNE)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"importance": "max"}, "IMPORTANCE must be one of .*got 'max'"),
        ({"protect": -1}, r"PROTECT must be in 0..100, got -1"),
        ({"protect": 101}, r"PROTECT must be in 0..100, got 101"),
    ],
)
def test_wrong_options_of_layer_pruning(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_pruning(**arguments)


# ----------------------------------------------------------------------------------- add-layer
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", sorted(ALL))
def test_adding_a_layer_changes_no_bit(name, stage):
    model = student(ALL[name])
    grown = AddLayer(max_depth=(9, 9, 9, 9)).apply(model, Action("AddLayer", stage))
    old, new = bottom_up(model).architecture, bottom_up(grown).architecture
    assert new.depths[stage] == old.depths[stage] + 1
    assert new.stages[stage][:-1] == old.stages[stage]
    x = images(97, 131)
    x = torch.nn.functional.pad(x, (0, 29, 0, 31))
    for training in (False, True):
        before, after = pyramid(model, x, training), pyramid(grown, x, training)
        assert all(torch.equal(before[k], after[k]) for k in before)
    for ours, theirs in zip(detections(model), detections(grown)):
        assert torch.equal(
            ours["instances"].pred_boxes.tensor, theirs["instances"].pred_boxes.tensor
        )


@pytest.mark.parametrize(
    "text, stage, added",
    [
        (BOTTLENECK, 0, "(6,7,16)"),
        (BOTTLENECK, 1, "(5,6,24)"),
        (BASIC, 1, "(7,12)"),
        # the last block projects: the one before that does not lends its widths
        ("[(4,5,16)-(6,7,16)-(3,3,20)],[(6,5,24)],[(8,7,28)],[(9,8,36)]", 0, "(6,7,20)"),
        # all blocks project
        ("[(4,5,16)],[(6,5,24)],[(8,7,28)],[(9,8,36)]", 2, "(8,7,28)"),
        ("[(8,8,16)g4-(8,8,16)g2],[(6,5,24)],[(8,7,28)],[(9,8,36)]", 0, "(8,8,16)g2"),
    ],
)
def test_widths_of_the_added_block(text, stage, added):
    model = student(text)
    grown = AddLayer(max_depth=(9, 9, 9, 9)).apply(model, Action("AddLayer", stage))
    stages = text.strip("[]").split("],[")
    stages[stage] += f"-{added}"
    assert str(bottom_up(grown).architecture) == "[" + "],[".join(stages) + "]"
    block = bottom_up(grown).stages[stage][-1]
    for conv in block.convs:
        # Dirac: the identity on as many channels as there are
        middle = conv.kernel_size[0] // 2
        dense = conv.weight.detach()[:, :, middle, middle]
        size = min(dense.shape[1], dense.shape[0] // conv.groups)
        assert conv.weight.detach().abs().sum() == size * conv.groups
        for group in dense.chunk(conv.groups):
            assert torch.equal(group[:size, :size], torch.eye(size))
    assert all((c.norm.weight == 1).all() for c in block.convs[:-1])
    assert not block.convs[-1].norm.weight.any()
    assert all(not c.norm.bias.any() and not c.norm.running_mean.any() for c in block.convs)
    assert all((c.norm.running_var == 1).all() for c in block.convs)
    assert all(c.norm.num_batches_tracked == 0 for c in block.convs)


def test_first_gradient_reaches_the_last_norm_only():
    model = student(MOVED).train()
    grown = AddLayer(max_depth=(9, 9, 9, 9)).apply(model, Action("AddLayer", 1))
    block = bottom_up(grown).res3[-1]
    optimizer = torch.optim.SGD(grown.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        with EventStorage(0):
            sum(grown(tiny_batch()).values()).backward()
        moved = {name for name, p in block.named_parameters() if p.grad.abs().max() > 0}
        optimizer.step()
        return moved

    assert step() == {"conv3.norm.weight", "conv3.norm.bias"}
    everything = {name for name, _ in block.named_parameters()}
    assert step() == everything


def test_legal_stages_and_depth_limit():
    add = AddLayer(max_depth=(2, 3, 2, 3))
    assert add.choices(parse(BOTTLENECK, STEM)) == [Action("AddLayer", 3)]
    cfg = tiny_cfg("GeneralizedRCNN")
    add = AddLayer(cfg, resolve("r101"))
    assert add.max_depth == (6, 7, 26, 6)
    assert [a.stage for a in add.choices(resolve("searched_r101"))] == [0, 1, 2, 3]
    cfg.SEARCH.ADD_LAYER.EXTRA_DEPTH = 0
    assert [a.stage for a in AddLayer(cfg, resolve("r101")).choices(resolve("searched_r101"))] == [
        2
    ]
    cfg.SEARCH.ADD_LAYER.EXTRA_DEPTH = -1
    with pytest.raises(ValueError, match="EXTRA_DEPTH must not be negative, got -1"):
        AddLayer(cfg, resolve("r101"))


def test_no_random_number_is_drawn_when_a_layer_is_added():
    model = student(MOVED)
    state = torch.get_rng_state()
    AddLayer(max_depth=(9, 9, 9, 9)).apply(model, Action("AddLayer", 1))
    assert torch.equal(torch.get_rng_state(), state)
