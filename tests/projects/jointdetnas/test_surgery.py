"""Selecting channels: subsets of dead ones, permutations, prefixes; what must not be shared."""

import pytest
import torch
from torch import nn

from kd_d2.projects.jointdetnas import MorphResNet, parse, select_channels
from kd_d2.projects.jointdetnas.surgery import (
    evaluating,
    kept_indices,
    layer_states,
    pyramid_inputs,
    rebuild,
)
from tests.fixtures import tiny_model
from tests.projects.jointdetnas.cases import (
    ALL,
    BOTTLENECK,
    MOVED,
    STEM,
    bottom_up,
    detections,
    images,
    morph_options,
    pyramid,
    randomise_norms,
    relative_difference,
    student,
)


def ungrouped(name):
    return name != "grouped"


def kill(model, inner, streams, beta=0.0):
    """Make channels dead: no weight and, in a stream, no bias in whatever adds to it."""
    body = bottom_up(model)
    arch = body.architecture
    with torch.no_grad():
        for (stage, block, conv), channels in inner.items():
            norm = body.block_at((stage, block)).convs[conv].norm
            norm.weight[channels] = 0
            norm.bias[channels] = beta
        for number, channels in streams.items():
            stream = arch.streams[number]
            norms = [body.block_at(p).convs[-1].norm for p in stream.blocks]
            if stream.source is not None:
                norms.append(body.block_at(stream.source).shortcut.norm)
            for norm in norms:
                norm.weight[channels] = 0
                norm.bias[channels] = 0


def quarter_of_everything(arch):
    """A quarter of all rankable channels, every stream that can be pruned included."""
    generator = torch.Generator().manual_seed(3)

    def some(width):
        return torch.randperm(width, generator=generator)[: max(1, width // 4)].tolist()

    inner = {
        (*p, conv): some(width)
        for p in arch.positions
        if arch.block(p).groups == 1
        for conv, width in enumerate(arch.block(p).channels[:-1])
    }
    streams = {i: some(s.width) for i, s in enumerate(arch.streams) if s.source is not None}
    return inner, streams


def kept(arch, inner, streams):
    return (
        {k: kept_indices(arch.block(k[:2]).channels[k[2]], gone) for k, gone in inner.items()},
        {k: kept_indices(arch.streams[k].width, gone) for k, gone in streams.items()},
    )


@pytest.mark.parametrize("name", sorted(ALL))
def test_pruning_dead_channels_changes_nothing(name):
    """In both modes, with a non-positive bias where ReLU gives zero."""
    model = student(ALL[name])
    arch = bottom_up(model).architecture
    inner, streams = quarter_of_everything(arch)
    kill(model, inner, streams, beta=-0.3)
    pruned = select_channels(model, *kept(arch, inner, streams))
    x = images()
    for training in (False, True):
        before, after = pyramid(model, x, training), pyramid(pruned, x, training)
        assert relative_difference(before, after) < 1e-5
    # what came out has the shapes that were asked for, and less of everything
    new = bottom_up(pruned).architecture
    for p in arch.positions:
        assert new.block(p).projection == arch.block(p).projection
        for conv, (was, now) in enumerate(zip(arch.block(p).channels, new.block(p).channels)):
            gone = inner.get((*p, conv), [])
            if conv == len(arch.block(p).channels) - 1:
                gone = streams.get(arch.stream_of(p), [])
            assert now == was - len(gone)
    ours = detections(model)[0]["instances"]
    theirs = detections(pruned)[0]["instances"]
    assert len(ours) == len(theirs) > 0
    assert torch.allclose(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, atol=1e-2)


def test_pruning_a_channel_with_a_positive_bias_changes_the_output():
    """It is a constant behind the ReLU, no compensation is attempted."""
    model = student(BOTTLENECK)
    inner = {(1, 0, 0): [1, 4], (2, 1, 1): [0]}
    kill(model, inner, {}, beta=0.3)
    pruned = select_channels(model, *kept(bottom_up(model).architecture, inner, {}))
    assert relative_difference(pyramid(model, images()), pyramid(pruned, images())) > 1e-3


@pytest.mark.parametrize("name", [n for n in sorted(ALL) if ungrouped(n)])
def test_permutation_keeps_the_function(name):
    model = student(ALL[name])
    arch = bottom_up(model).architecture
    generator = torch.Generator().manual_seed(5)

    def shuffled(width):
        order = torch.randperm(width, generator=generator)
        return order if width < 2 or not torch.equal(order, torch.arange(width)) else order.flip(0)

    inner = {
        (*p, conv): shuffled(width)
        for p in arch.positions
        for conv, width in enumerate(arch.block(p).channels[:-1])
    }
    streams = {i: shuffled(s.width) for i, s in enumerate(arch.streams)}
    sorted_model = select_channels(model, inner, streams)
    assert bottom_up(sorted_model).architecture == arch
    x = images(97, 131)
    for training in (False, True):
        # only with the pyramid: maps inside are permuted
        first = pyramid(model, _padded(x), training)
        assert relative_difference(first, pyramid(sorted_model, _padded(x), training)) < 1e-5
    res5 = bottom_up(model)(x)["res5"]
    order = streams[arch.stream_of(arch.positions[-1])]
    assert torch.allclose(bottom_up(sorted_model)(x)["res5"], res5[:, order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(bottom_up(sorted_model)(x)["res5"], res5, rtol=1e-2)


def _padded(x):
    return nn.functional.pad(x, (0, -x.shape[-1] % 32, 0, -x.shape[-2] % 32))


def test_prefix_slices_weights_by_hand():
    """Every tensor of the result, index by index, against a list of what belongs to what."""
    model = student(MOVED)
    inner = {(0, 1, 0): range(3), (3, 1, 1): range(5)}
    streams = {0: range(6), 1: range(10), 3: range(20)}
    # stream 3 is that of stage 3 and of the first block of stage 4
    result = select_channels(model, inner, streams)
    assert bottom_up(result).architecture.stem == 6
    assert str(bottom_up(result).architecture) == (
        "[(4,5,10)-(3,7,10)],[(6,5,24)-(7,8,24)],[(8,7,20)-(6,9,20)],"
        "[(5,4,20)-(9,5,36)-(7,6,36)]"
    )
    old, new = model.backbone.state_dict(), result.backbone.state_dict()
    slices = {
        "bottom_up.stem.conv1.weight": (6, 3),
        "bottom_up.stem.conv1.norm.bias": (6,),
        "bottom_up.res2.0.conv1.weight": (4, 6),
        "bottom_up.res2.0.conv3.weight": (10, 5),
        "bottom_up.res2.0.shortcut.weight": (10, 6),
        "bottom_up.res2.0.shortcut.norm.running_var": (10,),
        "bottom_up.res2.1.conv1.weight": (3, 10),
        "bottom_up.res2.1.conv1.norm.weight": (3,),
        "bottom_up.res2.1.conv2.weight": (7, 3),
        "bottom_up.res2.1.conv3.norm.running_mean": (10,),
        "bottom_up.res3.0.conv1.weight": (6, 10),
        "bottom_up.res3.0.shortcut.weight": (24, 10),
        "bottom_up.res4.0.shortcut.weight": (20, 24),
        "bottom_up.res4.1.conv1.weight": (6, 20),
        "bottom_up.res5.0.conv1.weight": (5, 20),
        "bottom_up.res5.0.conv3.weight": (20, 4),
        "bottom_up.res5.1.conv1.weight": (9, 20),
        "bottom_up.res5.1.conv2.weight": (5, 9),
        "bottom_up.res5.1.conv3.weight": (36, 5),
        "bottom_up.res5.1.shortcut.weight": (36, 20),
        "fpn_lateral2.weight": (12, 10),
        "fpn_lateral4.weight": (12, 20),
    }
    assert old.keys() == new.keys()
    for key, tensor in new.items():
        rows, columns = (*slices.get(key, ()), None, None)[:2]
        expected = old[key] if rows is None else old[key][:rows]
        if columns is not None:
            expected = expected[:, :columns]
        if key in slices or tensor.shape == old[key].shape:
            assert torch.equal(tensor, expected), key
        else:
            # the other batch norms of sliced convs
            assert torch.equal(tensor, old[key][tuple(map(slice, tensor.shape))]), key


def test_whole_groups_only():
    model = student(ALL["grouped"])
    x = images()
    groups = [0, 1, 4, 5, 6, 7]  # the second group of two channels is left out
    kill(model, {(0, 0, 0): [2, 3], (0, 0, 1): [2, 3]}, {})
    kept_groups = {(0, 0, 0): groups, (0, 0, 1): groups}
    result = select_channels(model, kept_groups)
    assert bottom_up(result).architecture.block((0, 0)).groups == 3
    assert bottom_up(result).res2[0].conv2.weight.shape == (6, 2, 3, 3)
    assert relative_difference(pyramid(model, x), pyramid(result, x)) < 1e-5
    # groups in another order are a permutation
    swapped = [4, 5, 6, 7, 0, 1]
    other = select_channels(model, {(0, 0, 0): swapped, (0, 0, 1): swapped})
    assert relative_difference(pyramid(model, x), pyramid(other, x)) < 1e-5
    for wrong in (
        {(0, 0, 0): groups},
        {(0, 0, 0): [0, 1, 3, 2], (0, 0, 1): [0, 1, 3, 2]},
        {(0, 0, 0): [1, 2], (0, 0, 1): [1, 2]},
        {(0, 0, 0): [0, 1, 2], (0, 0, 1): [0, 1, 2]},
    ):
        with pytest.raises(ValueError, match="stage 1 block 1 has 4 groups"):
            select_channels(model, wrong)


def test_conv_of_p6_on_c5_follows():
    """RetinaNet's pyramid reads C5 a second time."""
    model = tiny_model(
        "RetinaNet",
        **{
            **morph_options(MOVED),
            "MODEL.BACKBONE.NAME": "build_retinanet_morph_resnet_fpn_backbone",
            "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
            "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
        },
    ).eval()
    randomise_norms(model)
    assert pyramid_inputs(model) == {
        **{"fpn_lateral3": "res3", "fpn_lateral4": "res4", "fpn_lateral5": "res5"},
        "top_block.p6": "res5",
    }
    arch = bottom_up(model).architecture
    inner, streams = quarter_of_everything(arch)
    kill(model, inner, streams)
    pruned = select_channels(model, *kept(arch, inner, streams))
    assert relative_difference(pyramid(model, images()), pyramid(pruned, images())) < 1e-5
    assert pruned.backbone.top_block.p6.in_channels == 36 - 9
    detections(pruned)  # the head fits


def test_pyramid_uses_the_new_convs():
    """FPN calls the convs of its lists: they must be those that are registered."""
    model = student(MOVED)
    pruned = select_channels(model, streams={2: range(20)})
    fpn = pruned.backbone
    assert fpn.lateral_convs[2] is fpn.fpn_lateral3 and fpn.fpn_lateral3.in_channels == 20
    assert fpn.bottom_up is bottom_up(pruned) and fpn.bottom_up is not bottom_up(model)
    with torch.no_grad():
        before = fpn(images())["p3"]
        fpn.fpn_lateral3.weight.zero_()
        assert not torch.equal(fpn(images())["p3"], before)


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_nothing_is_shared_and_the_parent_is_unchanged():
    model = student(MOVED).train()
    before = {k: v.clone() for k, v in tensors(model).items()}
    storages = {t.untyped_storage().data_ptr() for t in tensors(model).values()}
    for child in (
        select_channels(model),
        select_channels(model, {(0, 0, 0): [0, 1]}, {1: range(8)}),
        rebuild(model, bottom_up(model).architecture, layer_states(bottom_up(model))),
    ):
        assert child.training and bottom_up(child).training
        assert not storages & {t.untyped_storage().data_ptr() for t in tensors(child).values()}
        assert all(t.device.type == "cpu" for t in tensors(child).values())
        assert all(p.requires_grad and p.grad is None for p in child.parameters())
        with torch.no_grad():
            for tensor in child.state_dict().values():
                tensor.zero_()
    assert all(torch.equal(v, before[k]) for k, v in tensors(model).items())
    assert str(bottom_up(model).architecture) == MOVED


def test_no_random_number_is_drawn():
    model = student(MOVED)
    state = torch.get_rng_state()
    select_channels(model, {(0, 0, 0): [0, 1]}, {1: range(8)})
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_stages_stay_frozen():
    model = student(MOVED, **{"MODEL.BACKBONE.FREEZE_AT": 2})
    child = select_channels(model, {(2, 0, 0): [0, 1]})
    frozen = {k: p.requires_grad for k, p in child.named_parameters()}
    assert frozen == {k: p.requires_grad for k, p in model.named_parameters()}
    assert not frozen["backbone.bottom_up.res2.0.conv1.weight"]
    full = pyramid(model, images())
    assert relative_difference(full, pyramid(select_channels(model), images())) == 0


def test_a_backbone_alone():
    body = MorphResNet(parse(MOVED, STEM)).eval()
    result = select_channels(body, streams={4: list(reversed(range(36)))})
    assert isinstance(result, MorphResNet)
    expected = body(images())["res5"].flip(1)
    assert torch.allclose(result(images())["res5"], expected, rtol=1e-4, atol=1e-5)


def test_ages_are_kept():
    model = student(MOVED)
    body = bottom_up(model)
    body.architecture = body.architecture.older(-98)
    assert (
        bottom_up(select_channels(model, streams={1: range(8)})).architecture.entry()["age"]
        == [2] * 9
    )


@pytest.mark.parametrize(
    "inner, streams, message",
    [
        ({(0, 0, 2): [0]}, {}, r"no conv \(0, 0, 2\)"),
        ({(5, 0, 0): [0]}, {}, r"no conv \(5, 0, 0\)"),
        ({}, {7: [0]}, "no stream 7"),
        ({(0, 0, 0): []}, {}, r"conv \(0, 0, 0\) would have no channel"),
        ({}, {1: [16]}, r"stream 1 must be different numbers in 0..15"),
        ({}, {1: [2, 2]}, "stream 1 must be different"),
        ({}, {1: [-1]}, "stream 1 must be different"),
    ],
)
def test_impossible_selections(inner, streams, message):
    with pytest.raises(ValueError, match=message):
        select_channels(student(MOVED), inner, streams)


def test_models_without_what_it_takes():
    with pytest.raises(ValueError, match="no MorphResNet: set MODEL.BACKBONE.NAME"):
        select_channels(tiny_model("GeneralizedRCNN"))
    wrapper = nn.Sequential(MorphResNet(parse(MOVED, STEM)))
    with pytest.raises(ValueError, match="only below a feature pyramid"):
        select_channels(wrapper, streams={1: [0]})


def test_evaluating_restores_modes():
    first, second = nn.Linear(1, 1).train(), nn.Linear(1, 1).eval()
    with pytest.raises(KeyError), evaluating(first, second):
        assert not first.training and not second.training
        raise KeyError
    assert first.training and not second.training
