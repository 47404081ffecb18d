"""Moving a block across the border of two stages."""

import pytest
import torch
import torch.nn.functional as F

from kd_d2.projects.jointdetnas import Action, parse, resolve
from kd_d2.projects.jointdetnas.laterals import refit_lateral
from kd_d2.projects.jointdetnas.rearrange import Rearrange
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


def rearrange(shortcut="subsample", lateral_init="ridge"):
    return Rearrange(shortcut=shortcut, lateral_init=lateral_init)


def right(stage):
    return Action("Rearrange", stage, "right")


def left(stage):
    return Action("Rearrange", stage, "left")


def tensors(model):
    """All tensors of the bottom-up network in network order, whatever their names."""
    body = bottom_up(model)
    blocks = [body.block_at(p) for p in body.architecture.positions]
    return [t for block in (body.stem, *blocks) for t in block.state_dict().values()]


@torch.no_grad()
def silence(model, *positions):
    """Zero the residual branches of blocks."""
    for position in positions:
        norm = bottom_up(model).block_at(position).convs[-1].norm
        norm.weight.zero_()
        norm.bias.zero_()


# -------------------------------------------------------------------------------------- legality
@pytest.mark.parametrize(
    "text, legal",
    [
        (BOTTLENECK, ["0r", "0l", "1r", "1l", "2r", "2l"]),
        # one block left in the second stage; the last block of the first projects
        (
            "[(4,5,16)-(6,7,16)p],[(6,5,24)],[(8,7,28)-(6,9,28)],[(9,8,36)]",
            ["1l", "2r"],
        ),
        ("[(4,16)],[(6,24)],[(8,28)],[(9,36)]", []),
        # an identity at stride 2 may go back
        (MOVED, ["0r", "0l", "1r", "1l", "2r", "2l"]),
    ],
)
def test_choices(text, legal):
    found = rearrange().choices(parse(text, STEM))
    assert [f"{a.stage}{a.direction[0]}" for a in found] == legal


def test_what_needs_images():
    base, moved = parse(BOTTLENECK, STEM), parse(MOVED, STEM)
    assert not rearrange().needs_images(base, right(1))
    assert rearrange().needs_images(base, left(1)) and rearrange().needs_images(moved, left(1))
    assert not rearrange().needs_images(moved, left(2))
    assert rearrange("projection").needs_images(base, right(1))
    with pytest.raises(ValueError, match="'Rearrange stage 2 left' needs images"):
        rearrange().apply(student(BOTTLENECK), left(1))


# ----------------------------------------------------------------------------------------- right
@pytest.mark.parametrize("border", range(3))
@pytest.mark.parametrize("name", sorted(ALL))
def test_right_then_left_is_the_same_network(name, border):
    model = student(ALL[name])
    old = bottom_up(model).architecture
    there = rearrange().apply(model, right(border))
    new = bottom_up(there).architecture
    depths = list(old.depths)
    depths[border] -= 1
    depths[border + 1] += 1
    assert new.depths == tuple(depths)
    assert [new.block(p) for p in new.positions] == [old.block(p) for p in old.positions]
    assert not new.block((border + 1, 0)).projection
    # no weight changes, only where the strides are
    assert all(torch.equal(a, b) for a, b in zip(tensors(model), tensors(there)))
    before, after = pyramid(model, images()), pyramid(there, images())
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert relative_difference(before, after) > 1e-4
    # the laterals are the same convs
    for level in range(2, 6):
        name = f"fpn_lateral{level}.weight"
        assert torch.equal(model.backbone.state_dict()[name], there.backbone.state_dict()[name])
    detections(there)
    back = rearrange().apply(there, left(border))
    assert bottom_up(back).architecture == old
    states = model.state_dict(), back.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert relative_difference(before, pyramid(back, images())) == 0


@pytest.mark.parametrize("border", range(3))
@pytest.mark.parametrize("name", sorted(ALL))
def test_right_is_exact_if_both_branches_are_zero(name, border):
    model = student(ALL[name])
    old = bottom_up(model).architecture
    silence(model, (border, old.depths[border] - 1), (border + 1, 0))
    there = rearrange().apply(model, right(border))
    for training in (False, True):
        before, after = pyramid(model, images(), training), pyramid(there, images(), training)
        assert relative_difference(before, after) == 0


def test_published_r101_can_be_reached_from_wider_stages():
    """Two blocks moved from stage 3 to stage 4 stand before its projection, 321 wide."""
    published = resolve("searched_r101")
    stages = [list(s) for s in published.stages]
    stages[2] += [stages[3].pop(0) for _ in range(2)]
    body_text = ",".join(
        "[" + "-".join("(" + ",".join(map(str, b.channels)) + ")" for b in s) + "]" for s in stages
    )
    before = parse(body_text)
    assert before.depths == (3, 4, 22, 3)
    assert right(2) in rearrange().choices(before)
    for _ in range(2):
        stages = [list(s) for s in before.stages]
        stages[3].insert(0, stages[2].pop())
        before = type(before)(tuple(map(tuple, stages)))
    assert before == published


# ------------------------------------------------------------------------------------------ left
@pytest.mark.parametrize("border", range(3))
@pytest.mark.parametrize("name", sorted(ALL))
def test_left(name, border):
    model = student(ALL[name])
    old = bottom_up(model).architecture
    there = rearrange().apply(model, left(border), [images(seed=s) for s in range(2)])
    new = bottom_up(there).architecture
    assert [new.block(p) for p in new.positions] == [old.block(p) for p in old.positions]
    assert new.depths[border] == old.depths[border] + 1
    assert all(torch.equal(a, b) for a, b in zip(tensors(model), tensors(there)))
    # the lateral of that level is another one if the block projects; everything else stays
    ours, theirs = model.backbone.state_dict(), there.backbone.state_dict()
    changed = {k for k in ours if k.startswith("fpn") and not _same(ours[k], theirs[k])}
    projection = old.block((border + 1, 0)).projection
    assert changed == ({f"fpn_lateral{border + 2}.weight"} if projection else set())
    width = new.block((border, new.depths[border] - 1)).out_channels
    lateral = getattr(there.backbone, f"fpn_lateral{border + 2}")
    assert lateral.in_channels == lateral.weight.shape[1] == width
    assert lateral in there.backbone.lateral_convs
    detections(there)


def _same(a, b):
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("name", ["bottleneck", "basic", "forced"])
def test_left_of_zero_branches_changes_the_levels_above_nothing(name):
    """The first blocks' branches are zero: projections at stride 1, then subsampled, are equal."""
    model = student(ALL[name])
    border = 1
    silence(model, (2, 0), (2, 1))
    there = rearrange().apply(model, left(border), [images()])
    ours, theirs = (bottom_up(m)(images()) for m in (model, there))
    for feature in ("res2", "res4", "res5"):
        assert torch.equal(ours[feature], theirs[feature])
    assert theirs["res3"].shape[1] == 28 if name != "basic" else 16


def test_refit_is_the_ridge_solution():
    """Against the augmented least-squares problem, solved by another method, in float64."""
    model = student(BOTTLENECK)
    batches = [images(seed=s) for s in range(3)]
    there = rearrange().apply(model, left(0), batches)
    found = there.backbone.fpn_lateral2.weight.detach()[:, :, 0, 0].double()
    with torch.no_grad():
        y = torch.cat([bottom_up(there)(b)["res2"] for b in batches])
        old = torch.cat([bottom_up(model)(b)["res2"] for b in batches])
        target = F.conv2d(old, model.backbone.fpn_lateral2.weight)
    y = y.double().permute(0, 2, 3, 1).reshape(-1, 24)
    target = target.double().permute(0, 2, 3, 1).reshape(-1, 12)
    rho = 1e-3 * (y**2).sum() / 24
    rows = torch.cat([y, rho.sqrt() * torch.eye(24)])
    expected = torch.linalg.lstsq(rows, torch.cat([target, torch.zeros(24, 12)])).solution.T
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-5)
    # the bias is the old one
    ours, theirs = model.backbone.fpn_lateral2, there.backbone.fpn_lateral2
    assert torch.equal(ours.bias, theirs.bias)
    # and the fit is a fit: far better than nothing
    residual = ((y @ found.T - target) ** 2).sum() / (target**2).sum()
    assert residual < 0.2


def test_refit_reproduces_what_is_still_there():
    """If the projection only mixes channels of a positive map, hardly anything is lost."""
    model = student("[(4,5,16)-(6,7,16)],[(6,5,24)-(7,8,24)],[(8,7,28)],[(9,8,36)-(7,6,36)]")
    silence(model, (1, 0))
    body = bottom_up(model)
    with torch.no_grad():
        shortcut = body.res3[0].shortcut
        shortcut.weight.uniform_(0.0, 1.0, generator=torch.Generator().manual_seed(1))
        shortcut.norm.weight.fill_(1.0)
        shortcut.norm.bias.fill_(2.0)
        shortcut.norm.running_mean.zero_()
    there = rearrange().apply(model, left(0), [images(seed=s) for s in range(4)])
    with torch.no_grad():
        fresh = images(seed=9)
        old = model.backbone.fpn_lateral2(body(fresh)["res2"])
        new = there.backbone.fpn_lateral2(bottom_up(there)(fresh)["res2"])
    assert ((old - new) ** 2).sum() / (old**2).sum() < 0.05


def test_refit_of_a_lateral_with_a_norm():
    """Without a bias the conv's output is fitted, and the norm stays."""
    model = student(BOTTLENECK, **{"MODEL.FPN.NORM": "BN"})
    there = rearrange().apply(model, left(1), [images()])
    ours, theirs = model.backbone.fpn_lateral3, there.backbone.fpn_lateral3
    assert theirs.bias is None and torch.equal(ours.norm.weight, theirs.norm.weight)
    assert theirs.weight.shape == (12, 28, 1, 1)


def test_refit_of_a_map_that_is_zero_everywhere():
    model = student(BOTTLENECK)
    with torch.no_grad():
        for conv in (bottom_up(model).res3[0].shortcut, bottom_up(model).res3[0].conv3):
            conv.norm.weight.zero_()
            conv.norm.bias.fill_(-1.0)
    there = rearrange().apply(model, left(0), [images()])
    assert not there.backbone.fpn_lateral2.weight.any()


def test_measuring_leaves_modes_and_statistics():
    model = student(BOTTLENECK).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    there = rearrange().apply(model, left(0), [images()])
    assert model.training and bottom_up(model).training
    assert there.training and bottom_up(there).training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    after = there.state_dict()["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"]
    assert after == before["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"]
    body = bottom_up(there)
    refit_lateral(model, "fpn_lateral2", "res2", body, [images()])
    assert body.training


def test_fresh_lateral():
    torch.manual_seed(3)
    there = rearrange(lateral_init="xavier").apply(student(BOTTLENECK), left(1), [images()])
    weight = there.backbone.fpn_lateral3.weight
    torch.manual_seed(3)
    expected = torch.nn.init.kaiming_uniform_(torch.empty(12, 28, 1, 1), a=1)
    assert torch.equal(weight, expected)


# ---------------------------------------------------------------- projection instead of subsampling
def test_identity_projection():
    """The detector's outputs with it are those of subsampling; it starts a stream of its own."""
    model = student(BOTTLENECK)
    batches = [images(seed=s) for s in range(2)]
    plain = rearrange().apply(model, right(1))
    there = rearrange("projection").apply(model, right(1), batches)
    assert str(bottom_up(there).architecture) == (
        "[(4,5,16)-(6,7,16)],[(6,5,24)-(7,8,24)],[(5,6,24)p-(8,7,28)-(6,9,28)],"
        "[(9,8,36)-(7,6,36)]"
    )
    assert (
        relative_difference(pyramid(plain, images(seed=7)), pyramid(there, images(seed=7))) < 1e-5
    )
    shortcut = bottom_up(there).res4[0].shortcut
    assert torch.equal(shortcut.weight[:, :, 0, 0], torch.eye(24))
    with torch.no_grad():
        maps = torch.cat(
            [
                bottom_up(plain).res3(bottom_up(plain).res2(bottom_up(plain).stem(b)))
                for b in batches
            ]
        )
    values = maps[:, :, ::2, ::2].movedim(1, 0).flatten(1)
    assert torch.allclose(shortcut.norm.running_mean, values.mean(1), rtol=1e-4, atol=1e-6)
    assert torch.allclose(
        shortcut.norm.running_var, values.var(1, unbiased=False), rtol=1e-3, atol=1e-6
    )
    # in training mode as well, on the batch that it was measured on
    body = bottom_up(rearrange("projection").apply(model, right(1), [images()]))
    with torch.no_grad():
        x = bottom_up(plain).eval().res3(bottom_up(plain).res2(bottom_up(plain).stem(images())))
        out = body.res4[0].shortcut.train()(x)
    assert torch.allclose(out, x[:, :, ::2, ::2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["basic", "grouped", "moved"])
def test_identity_projection_of_other_blocks(name):
    model = student(ALL[name])
    plain = rearrange().apply(model, right(0))
    there = rearrange("projection").apply(model, right(0), [images()])
    assert relative_difference(pyramid(plain, images()), pyramid(there, images())) < 1e-5
    assert bottom_up(there).architecture.block((1, 0)).projection
    detections(there)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"shortcut": "none"}, "SHORTCUT must be one of .*'subsample'.*got 'none'"),
        ({"lateral_init": "zero"}, "LATERAL_INIT must be one of .*'ridge', 'xavier'.*'zero'"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        rearrange(**arguments)


def test_texts_used_here_are_what_they_should_be():
    assert parse(BASIC, STEM).depths == parse(BOTTLENECK, STEM).depths == (2, 3, 2, 2)
    assert parse(FORCED, STEM).block((1, 1)).projection
