"""MGD: the share of hidden positions, the generator, presets."""

import pytest
import torch

from kd_d2.baselines import MGD
from kd_d2.blocks import MaskedGenerator
from tests.baselines.feature_cases import ToyContext, kd_model, neck_keys, networks


def _adapter(mask_ratio=0.65, widths=((2, 2),)):
    adapter = MaskedGenerator(mask_ratio)
    adapter.build(list(widths))
    return adapter


def test_share_of_hidden_positions():
    """67 200 draws: 0.65 +- 4 deviations; a position is hidden in all channels at once."""
    adapter = _adapter()
    adapter.generators[0] = torch.nn.Identity()
    torch.manual_seed(0)
    out = adapter(torch.ones(3, 2, 140, 160), 0)
    assert torch.equal(out[:, 0], out[:, 1]) and set(out.unique().tolist()) == {0.0, 1.0}
    assert (out[:, 0] == 0).float().mean().item() == pytest.approx(0.65, abs=0.0075)
    assert not torch.equal(out, adapter(torch.ones(3, 2, 140, 160), 0))


def test_value_without_a_mask():
    """mask_ratio 0 and a generator that doubles: sum (2S - T)^2 / N."""
    keys = neck_keys(2)
    distiller = MGD(student_keys=keys, teacher_keys=keys, weight=1.0, mask_ratio=0.0)
    generator = distiller.pair_terms["feat"].adapter.generators[0]
    with torch.no_grad():
        for conv in (generator[0], generator[2]):
            conv.weight.zero_()
            conv.bias.zero_()
            conv.weight[range(2), range(2), 1, 1] = torch.tensor([2.0, 1.0])
    student = torch.tensor([[[[1.0, 2.0]], [[3.0, 0.5]]]]).repeat(2, 1, 1, 1)
    teacher = torch.tensor([[[[1.0, 9.0]], [[2.0, 0.5]]]]).repeat(2, 1, 1, 1)
    # channel 0 is multiplied by 4, channel 1 by 1: (4-1)^2 + (8-9)^2 + (3-2)^2 + 0 an image
    value = distiller(ToyContext({"neck": [student]}, {"neck": [teacher]}, [(), ()]))["feat"]
    assert value.item() == pytest.approx(11.0)


def test_number_of_parameters():
    def count(widths):
        return sum(p.numel() for p in _adapter(widths=widths).parameters())

    assert count([(256, 256)]) == 1_180_160
    assert count([(256, 256)] * 5) == 5 * 1_180_160
    assert count([(128, 256)]) == 1_180_160 + 128 * 256 + 256


@pytest.mark.parametrize(
    "arch, weight, ratio, levels",
    [
        ("RetinaNet", 2e-5, 0.65, 5),
        ("FCOS", 2e-5, 0.65, 5),
        ("GFL", 2e-5, 0.65, 5),
        ("ATSS", 2e-5, 0.65, 5),
        ("GeneralizedRCNN", 5e-7, 0.45, 4),
    ],
)
def test_presets(arch, weight, ratio, levels):
    distiller = kd_model("MGD", *networks(arch), arch).distillers["mgd"]
    adapter = distiller.pair_terms["feat"].adapter
    assert distiller.weights == {"feat": weight}
    assert adapter.mask_ratio == ratio and len(adapter.generators) == levels


@pytest.mark.parametrize(
    "options, message",
    [
        ({"MASK_RATIO": 1.0}, r"KD.MGD.MASK_RATIO must be in \[0, 1\), got 1.0"),
        ({"WEIGHT": -3.0}, "KD.MGD.WEIGHT must be -1.0 .* got -3.0"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        kd_model("MGD", *networks(), **options)


def test_a_family_without_preset():
    from kd_d2.baselines.options import preset

    message = "KD.MGD.WEIGHT is -1.0 .*'SSD', only for GFL; set KD.MGD.WEIGHT"
    with pytest.raises(ValueError, match=message):
        preset("KD.MGD.WEIGHT", -1.0, {"GFL": 1.0}, "SSD")
    assert preset("KD.MGD.WEIGHT", 0.0, {}, "SSD") == 0.0


def test_levels_are_paired_by_stride():
    """Faster R-CNN (P2-P5) teaches RetinaNet (P3-P7): P3, P4, P5."""
    model = kd_model("MGD", *networks("RetinaNet", "GeneralizedRCNN"), "RetinaNet")
    assert len(model.distillers["mgd"].pair_terms["feat"].adapter.generators) == 3
