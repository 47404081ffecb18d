"""FGFI: mask, divisor and adapter of both variants, worked out by hand."""

import pytest
import torch

from kd_d2.baselines import FGFI
from kd_d2.distillation import LossSchedule
from tests.baselines.feature_cases import (
    ToyContext,
    kd_model,
    level_keys,
    networks,
    single_anchor_view,
)
from tests.fixtures import tiny_cfg


def _context(stride=8):
    """Student 0.1 above the teacher everywhere; a plus of 5 cells is near the box."""
    scale = stride / 8
    student, teacher = torch.full((1, 2, 4, 4), 5.1), torch.full((1, 2, 4, 4), 5.0)
    view = single_anchor_view({"neck": [student], "neck.p3": student}, 16 * scale, 4, stride)
    size = (4 * stride, 4 * stride)
    box = [(0, 0, 24 * scale, 24 * scale)]
    return ToyContext(view, {"neck": [teacher], "neck.p3": teacher}, [box], size)


def _identity(distiller):
    """Make the 3x3 convolution of the only level the identity."""
    layer = distiller.pair_terms["feat"].adapter.layers[0]
    conv = layer[0] if isinstance(layer, torch.nn.Sequential) else layer
    torch.nn.init.dirac_(conv.weight)
    return distiller


def test_original_worked_out():
    """5 cells, 2 channels, 0.01 each: 0.1 / (2 * 5) = 0.01."""
    keys = level_keys(stride=16)
    distiller = _identity(FGFI(student_keys=keys, teacher_keys=keys, weight=0.01))
    ctx = _context(16)
    assert distiller(ctx)["feat"].item() == pytest.approx(1e-4, rel=1e-3)
    assert ctx.raw["fgfi/feat"].item() == pytest.approx(0.01, rel=1e-3)


def test_on_fpn_worked_out():
    """Divided by the channels, too: 0.005."""
    keys = level_keys()
    distiller = _identity(FGFI(student_keys=keys, teacher_keys=keys, variant="fpn", weight=3.0))
    assert distiller(_context())["feat"].item() == pytest.approx(0.015, rel=1e-3)


def test_no_object():
    keys = level_keys(stride=16)
    distiller = FGFI(student_keys=keys, teacher_keys=keys)
    ctx = _context(16)
    ctx.gt_instances = [ctx.gt_instances[0][:0]]
    assert distiller(ctx)["feat"].item() == 0.0


@pytest.mark.parametrize("arch, level", [("GFL", 1), ("GeneralizedRCNN", 2), ("C4", 0)])
def test_original_compares_the_map_of_stride_16(arch, level):
    distiller = kd_model("FGFI", *networks(arch), arch).distillers["fgfi"]
    term = distiller.pair_terms["feat"]
    assert term.source.indices == ((level, level),)
    (layer,) = term.adapter.layers
    assert isinstance(layer[1], torch.nn.ReLU) and layer[0].kernel_size == (3, 3)
    assert layer[0].weight.std().item() == pytest.approx(0.88e-4, rel=0.1)  # cut at 2 deviations
    assert layer[0].weight.abs().max() <= 2e-4 and not layer[0].bias.any()
    assert distiller.weights == {"feat": 0.01}


@pytest.mark.parametrize(
    "arch, strides", [("RetinaNet", (8, 16, 32, 64, 128)), ("GeneralizedRCNN", (4, 8, 16, 32, 64))]
)
def test_variant_fpn_compares_the_levels_with_anchors(arch, strides):
    """P3-P7 and P2-P6, 590 080 parameters a level at 256 channels."""
    distiller = kd_model("FGFI", *networks(arch), arch, VARIANT="fpn").distillers["fgfi"]
    term = distiller.pair_terms["feat"]
    assert term.source.strides == strides and distiller.weights == {"feat": 3.0}
    keys = level_keys(256)
    wide = FGFI(student_keys=keys, teacher_keys=keys, variant="fpn")
    assert sum(p.numel() for p in wide.parameters()) == 590_080


def test_starts_after_400_iterations():
    schedule = LossSchedule.from_node(tiny_cfg("GFL").KD.FGFI.SCHEDULE, 90000)
    assert [schedule(i) for i in (0, 399, 400, 89999)] == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"VARIANT": "c4"}, "KD.FGFI.VARIANT must be one of .*'c4'"),
        ({"THRESHOLD": -0.1}, r"KD.FGFI.THRESHOLD must be in \[0, 1\), got -0.1"),
        ({"WEIGHT": -2.0}, "KD.FGFI.WEIGHT must be -1.0"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        kd_model("FGFI", *networks(), **options)


def test_no_map_of_stride_16():
    teacher = {"MODEL.GFL.IN_FEATURES": ["p3", "p5"]}
    with pytest.raises(ValueError, match=r"KD.FGFI.VARIANT 'original' .*share strides \(8, 32\)"):
        kd_model("FGFI", *networks(**teacher))
