"""FitNets: the mean squared difference of whole pyramids, its adapters, LD's variant."""

import pytest
import torch

from kd_d2.baselines import FitNets
from tests.baselines.feature_cases import (
    ToyContext,
    kd_model,
    neck_keys,
    networks,
    run_step,
    terms_of,
)
from tests.fixtures import tiny_batch


def test_worked_out():
    """Differences (1, 2, 0, 3) of a level and 2 of the next: 14 / 4 + 4."""
    keys = neck_keys(1, (8, 16))
    distiller = FitNets(student_keys=keys, teacher_keys=keys, weight=2.0, adapter="none")
    student = [
        torch.tensor([1.0, 2.0, 0.0, 3.0]).reshape(1, 1, 2, 2),
        torch.full((1, 1, 1, 1), 2.0),
    ]
    teacher = [torch.zeros_like(x) for x in student]
    ctx = ToyContext({"neck": student}, {"neck": teacher})
    assert distiller(ctx)["feat"].item() == pytest.approx(2 * 7.5)


@pytest.mark.parametrize("arch", ["FCOS", "GeneralizedRCNN"])
def test_real_networks_as_in_lds_table(arch):
    student, teacher = networks(arch)
    batch = tiny_batch()
    model = kd_model("FitNets", student, teacher, arch, ADAPTER="none", WEIGHT=2.0)
    with torch.no_grad():
        sides = []
        for network in (student, teacher.model):
            features = network.backbone(network.preprocess_image(batch).tensor)
            names = getattr(network, "head_in_features", None) or ["p2", "p3", "p4", "p5"]
            sides.append([features[f] for f in names])
        expected = 2 * sum((s - t).square().mean() for s, t in zip(*sides))
    assert terms_of(run_step(model, batch))["feat"].item() == pytest.approx(
        expected.item(), rel=1e-3
    )


def test_adapters():
    """65 792 parameters a level at 256 channels; "auto" has none where the widths agree."""
    keys = neck_keys(256)

    def count(adapter, student=keys):
        distiller = FitNets(student_keys=student, teacher_keys=keys, adapter=adapter)
        return sum(p.numel() for p in distiller.parameters())

    assert (count("conv"), count("auto"), count("none")) == (65_792, 0, 0)
    assert count("auto", neck_keys(128)) == 128 * 256 + 256
    with pytest.raises(ValueError, match="FitNets, term 'feat': 'neck' has 128 channels"):
        count("none", neck_keys(128))


def test_resizing():
    """Pairs by index: the teacher's finer maps are resized to the student's size."""
    student, teacher = networks("RetinaNet", "GeneralizedRCNN")
    with pytest.raises(ValueError, match="level 0 of the student's 'neck' has stride 8"):
        kd_model("FitNets", student, teacher, "RetinaNet", PAIR="index")
    model = kd_model("FitNets", student, teacher, "RetinaNet", PAIR="index", RESIZE="teacher")
    assert len(model.distillers["fitnets"].pair_terms["feat"].adapter.layers) == 4
    assert terms_of(run_step(model, tiny_batch()))["feat"] > 0


def test_a_value_that_cannot_work():
    with pytest.raises(ValueError, match="KD.FITNETS.ADAPTER must be one of .*'fc'"):
        kd_model("FitNets", *networks(), ADAPTER="fc")
