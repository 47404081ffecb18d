"""The last stage of R-18 and R-34 in a C4 head is torchvision's."""

import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from torch import nn

from kd_d2.distillation import build_tap
from kd_d2.modeling.convert import compare_with_model, convert_torchvision
from kd_d2.modeling.roi_heads import KDRes5ROIHeads
from tests.blocks.support import observed
from tests.fixtures import tiny_batch, tiny_cfg, tiny_model

NAME = {"MODEL.ROI_HEADS.NAME": "KDRes5ROIHeads"}
R50 = {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.RES2_OUT_CHANNELS": 256}


@pytest.mark.parametrize("depth", [18, 34])
def test_imagenet_weights_fit_and_the_stage_agrees_with_torchvision(depth):
    torch.manual_seed(0)
    reference = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    with torch.no_grad():
        for norm in (m for m in reference.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
    model = build_model(tiny_cfg("C4", **NAME, **{"MODEL.RESNETS.DEPTH": depth})).eval()
    converted = convert_torchvision(reference.state_dict(), "backbone.", "roi_heads.res5.")
    comparison = compare_with_model(converted, model.state_dict())
    assert comparison.fits and not converted.unused
    assert all(name.startswith(("proposal_", "roi_heads.box_")) for name in comparison.initial)
    model.load_state_dict(converted.state_dict, strict=False)
    with torch.no_grad():
        x = torch.randn(3, 256, 6, 6)
        torch.testing.assert_close(
            model.roi_heads.res5(x), reference.layer4(x), rtol=1e-4, atol=1e-4
        )
        image = torch.randn(1, 3, 64, 64)
        y = reference.maxpool(reference.relu(reference.bn1(reference.conv1(image))))
        for stage in (reference.layer1, reference.layer2, reference.layer3):
            y = stage(y)
        torch.testing.assert_close(model.backbone(image)["res4"], y, rtol=1e-4, atol=1e-4)


def test_they_do_not_fit_detectron2s_own_head():
    converted = convert_torchvision(
        torchvision.models.resnet18(weights=None).state_dict(), "backbone.", "roi_heads.res5."
    )
    assert not compare_with_model(converted, tiny_model("C4").state_dict()).fits


def test_bottlenecks_are_detectron2s():
    own = tiny_model("C4", **NAME, **R50).state_dict()
    theirs = tiny_model("C4", **R50).state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(own[k], theirs[k]) for k in own)


def test_tap_reads_it_as_the_c4_head_that_it_is():
    model = tiny_model("C4", **NAME)
    assert isinstance(model.roi_heads, KDRes5ROIHeads)
    keys = build_tap(model).keys(model)
    assert keys["roi.feat"].channels == 256 and keys["roi.embed"].channels == 512
    seen = observed(model, tiny_batch(), ["proposals", "roi.feat", "roi.embed", "roi.cls"]).student
    assert len(seen["roi.cls"]) == sum(len(p) for p in seen["proposals"]) > 0
    pooled = model.roi_heads.res5(seen["roi.feat"]).mean(dim=(2, 3))
    torch.testing.assert_close(pooled, seen["roi.embed"])
    seen["roi.cls"].sum().backward()
    assert model.roi_heads.res5[1].conv2.weight.grad.abs().sum() > 0


def test_quarter_width_r50():
    cfg = tiny_cfg(
        "GeneralizedRCNN",
        **{
            "MODEL.RESNETS.DEPTH": 50,
            "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
            "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
        },
    )
    bottom_up = build_model(cfg).backbone.bottom_up
    widths = {name: shape.channels for name, shape in bottom_up.output_shape().items()}
    assert widths == {"res2": 64, "res3": 128, "res4": 256, "res5": 512}
    convolutions = sum(m.weight.numel() for m in bottom_up.modules() if isinstance(m, nn.Conv2d))
    # G-DetKD's Table 3: 1/16 of R-50's 23.45 M, but for the stem's three input channels
    assert sum(p.numel() for p in bottom_up.parameters()) == convolutions
    assert round(convolutions / 1e6, 2) == 1.47
