"""FGD: attention, masks and relations worked out by hand; presets; parameters."""

import pytest
import torch

from kd_d2.baselines import FGD
from kd_d2.blocks import ContextBlock
from kd_d2.losses.attention import channel_attention, spatial_attention
from tests.baselines.feature_cases import ToyContext, kd_model, neck_keys, networks, run_step
from tests.fixtures import tiny_batch

TEACHER = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])


def _distiller(**options):
    keys = neck_keys(2)
    return FGD(student_keys=keys, teacher_keys=keys, **options)


def _raw(student, teacher=TEACHER, foreground=(1.0, 0.0)):
    """Unweighted terms with a foreground mask as given and its complement as background."""
    distiller = _distiller()
    mask = torch.tensor([[foreground]])
    distiller._foreground = lambda ctx, pair: mask
    distiller._background = lambda ctx, pair: 1 - mask
    ctx = ToyContext({"neck": [student]}, {"neck": [teacher]}, image_size=(8, 16))
    distiller(ctx)
    return {name.split("/")[1]: value.item() for name, value in ctx.raw.items()}


def test_attention():
    for found in (spatial_attention(TEACHER, 0.5), channel_attention(TEACHER, 0.5)):
        torch.testing.assert_close(found.flatten(), torch.tensor([1.761594, 0.238406]))
    torch.testing.assert_close(spatial_attention(torch.zeros(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))
    assert channel_attention(TEACHER.half(), 0.5).dtype == torch.float32


def test_worked_out():
    found = _raw(torch.zeros_like(TEACHER))
    assert found["attention"] == pytest.approx(3.046377, abs=1e-5)
    assert found["fg"] == pytest.approx(12.412856, abs=1e-5)
    assert found["bg"] == 0.0
    # at the start both blocks are the identity: |S - T|^2
    assert found["relation"] == pytest.approx(4.0)


def test_background_worked_out():
    """S = T + (0, 1) on both channels: A^S of the second position times both A^C, 0.476812."""
    found = _raw(TEACHER + torch.tensor([0.0, 1.0]))
    assert found["fg"] == 0.0
    assert found["bg"] == pytest.approx(0.476812, abs=1e-5)


def test_sums_are_divided_by_the_images():
    student = torch.zeros_like(TEACHER)
    distiller = _distiller(fg_weight=1.0)
    ctx = ToyContext(
        {"neck": [student.repeat(3, 1, 1, 1)]},
        {"neck": [TEACHER.repeat(3, 1, 1, 1)]},
        [[(0, 0, 8, 8)]] * 3,
        (8, 16),
    )
    distiller(ctx)
    assert ctx.raw["fgd/attention"].item() == pytest.approx(3.046377, abs=1e-5)
    assert ctx.raw["fgd/relation"].item() == pytest.approx(4.0)


def test_masks_of_ground_truth():
    """One box of a 32x32 image on a 4x4 map: 1/9 on rows and columns 1-3, 1/7 on the others."""
    keys = neck_keys(2)
    distiller = FGD(student_keys=keys, teacher_keys=keys, temperature=1e6)  # attention 1
    student, teacher = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    student[0, :, 1, 2], student[0, :, 0, 3] = 3.0, 2.0
    ctx = ToyContext({"neck": [student]}, {"neck": [teacher]}, [[(8, 8, 20, 20)]])
    distiller(ctx)
    assert ctx.raw["fgd/fg"].item() == pytest.approx(2 * (8 + 9) / 9, rel=1e-4)
    assert ctx.raw["fgd/bg"].item() == pytest.approx(2 * (6 + 4) / 7, rel=1e-4)


def test_relations():
    """The block against a loop over the positions."""
    torch.manual_seed(0)
    block = ContextBlock(4)
    x = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(block(x), x)  # the last layer starts at 0
    torch.nn.init.normal_(block.change[-1].weight)
    expected = x.clone()
    for n in range(2):
        scores = [(block.key.weight.flatten() @ x[n, :, i, j]) for i in range(3) for j in range(5)]
        shares = torch.stack(scores).softmax(0)
        context = sum(
            share * x[n, :, i, j]
            for share, (i, j) in zip(shares, [(i, j) for i in range(3) for j in range(5)])
        )
        hidden = block.change[0].weight.flatten(1) @ context + block.change[0].bias
        hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
        expected[n] += (block.change[3].weight.flatten(1) @ hidden.relu())[:, None, None]
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_number_of_parameters():
    keys = neck_keys(256, (8, 16))
    distiller = FGD(student_keys=keys, teacher_keys=keys)
    assert sum(p.numel() for p in distiller.parameters()) == 2 * 132_866
    narrow = FGD(student_keys=neck_keys(128, (8, 16)), teacher_keys=keys)
    added = 128 * 256 + 256
    assert sum(p.numel() for p in narrow.parameters()) == 2 * (132_866 + added)


def test_both_relation_blocks_learn():
    student, teacher = networks()
    model = kd_model("FGD", student, teacher)
    sum(run_step(model, tiny_batch()).values()).backward()
    distiller = model.distillers["fgd"]
    for blocks in (distiller.student_relation, distiller.teacher_relation):
        for block in blocks:
            assert block.change[-1].weight.grad.abs().max() > 0
    assert not set(distiller.student_relation.parameters()) & set(
        distiller.teacher_relation.parameters()
    )


@pytest.mark.parametrize(
    "arch, temperature, weights, levels",
    [
        ("RetinaNet", 0.5, (1e-3, 5e-4, 5e-4, 5e-6), 5),
        ("GFL", 0.5, (1e-3, 5e-4, 5e-4, 5e-6), 5),
        ("ATSS", 0.5, (1e-3, 5e-4, 5e-4, 5e-6), 5),
        ("FCOS", 0.8, (1.6e-3, 8e-4, 8e-4, 8e-6), 5),
        ("GeneralizedRCNN", 0.5, (5e-5, 2.5e-5, 5e-5, 5e-7), 4),
    ],
)
def test_presets(arch, temperature, weights, levels):
    distiller = kd_model("FGD", *networks(arch), arch).distillers["fgd"]
    assert distiller._temperature == temperature
    assert tuple(distiller.weights.values()) == weights
    assert tuple(distiller.weights) == ("fg", "bg", "attention", "relation")
    assert len(distiller.student_relation) == levels


def test_values_of_the_config_win():
    own = {"TEMPERATURE": 0.7, "FG_WEIGHT": 0.0, "RELATION_WEIGHT": 1.0}
    distiller = kd_model("FGD", *networks(), **own).distillers["fgd"]
    assert distiller._temperature == 0.7
    assert tuple(distiller.weights.values()) == (0.0, 5e-4, 5e-4, 1.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"TEMPERATURE": 0.0}, "KD.FGD.TEMPERATURE must be positive, got 0.0"),
        ({"BG_WEIGHT": -0.5}, "KD.FGD.BG_WEIGHT must be -1.0 .* got -0.5"),
        ({"SCALE": "pixel"}, "KD.FGD.SCALE must be one of .*'pixel'"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        kd_model("FGD", *networks(), **options)


def test_levels_that_cannot_be_paired():
    other = neck_keys(2, (64,))
    with pytest.raises(ValueError, match=r"FGD: .*strides \(8,\).*\(64,\): no level in common"):
        FGD(student_keys=neck_keys(2), teacher_keys=other)
