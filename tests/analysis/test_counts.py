"""Parameters and multiply-adds by group, against numbers computed by hand."""

import pytest
import torch
from detectron2.modeling.meta_arch import RetinaNet
from torch import nn
from torchvision.ops import DeformConv2d

from kd_d2.analysis import (
    by_group,
    deployed,
    flop_analysis,
    flops_by_module,
    image_size_of,
    module_groups,
    parameters_by_group,
    random_batch,
)
from tests.fixtures import CLASSES, save_weights, tiny_cfg, tiny_model


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bottom_up = nn.Sequential(conv, nn.BatchNorm2d(8))
        self.lateral = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.lateral(self.bottom_up(x))


class Detector(nn.Module):
    """A backbone, a head that is used twice, an unused matrix and a product of its own."""

    def __init__(self):
        super().__init__()
        self.backbone = Pyramid()
        self.anchors = nn.Identity()
        self.head = nn.Linear(4, 5)
        self.own = nn.Parameter(torch.ones(5, 7))

    def forward(self, x):
        pooled = self.backbone(x).mean(dim=(2, 3))
        return (self.head(pooled) + self.head(2 * pooled)) @ self.own


def test_a_network_by_hand():
    model = Detector().eval()
    groups = module_groups(model)
    assert [group.name for group in groups] == ["backbone.bottom_up", "backbone.fpn", "head"]
    # 2 images of 16x20: the strided conv has 8x10 positions
    analysis = flop_analysis(model, torch.zeros(2, 3, 16, 20))
    positions = 2 * 8 * 10
    bottom_up = positions * 3 * 8 * 9 + 2 * positions * 8  # conv, scale and shift
    expected = {
        "backbone.bottom_up": bottom_up,
        "backbone.fpn": positions * 8 * 4,
        "head": 2 * (2 * 4 * 5),
        "rest": 2 * 5 * 7,
    }
    assert analysis.total() == sum(expected.values())
    assert by_group(groups, flops_by_module(analysis), analysis.total()) == expected
    assert parameters_by_group(model, groups) == {
        "backbone.bottom_up": 3 * 8 * 9 + 2 * 8,
        "backbone.fpn": 8 * 4 + 4,
        "head": 4 * 5 + 5,
        "rest": 5 * 7,
    }


def test_shared_parameters_count_once():
    model = Detector()
    model.twin = nn.Linear(4, 5)
    model.twin.weight = model.head.weight
    counts = parameters_by_group(model, module_groups(model))
    assert counts["head"] == 25 and counts["twin"] == 5
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


class Deformable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = DeformConv2d(6, 4, (3, 5), padding=(1, 2))

    def forward(self, x):
        return self.conv(x, x.new_zeros(len(x), 30, *x.shape[-2:]))


def test_a_deformable_convolution():
    total = flop_analysis(Deformable(), torch.zeros(2, 6, 7, 8)).total()
    assert total == 2 * 7 * 8 * 6 * 4 * 3 * 5


def test_the_head_of_a_detector():
    """Two towers of two convs and two predictors on 341 cells, 4 anchors in each."""
    model = tiny_model("RetinaNet").eval()
    batch = random_batch(1, 128, 128, len(CLASSES))
    analysis = flop_analysis(model, batch)
    groups = module_groups(model)
    found = by_group(groups, flops_by_module(analysis), analysis.total())
    cells = 16**2 + 8**2 + 4**2 + 2**2 + 1
    assert found["head"] == cells * 9 * 32 * (2 * 2 * 32 + 4 * 3 + 4 * 4)
    assert list(found) == ["backbone.bottom_up", "backbone.fpn", "head", "rest"]
    assert found["rest"] == 0


def test_parts_for_training_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(RetinaNet, "training_only_modules", ("head.bbox_pred",), raising=False)
    cfg = tiny_cfg("RetinaNet")
    whole = tiny_model("RetinaNet", seed=4)
    state = whole.state_dict()
    path = save_weights(whole, tmp_path / "whole.pth")
    for name in [name for name in state if name.startswith("head.bbox_pred")]:
        del state[name]
    torch.save({"model": state}, tmp_path / "stripped.pth")
    for file in (path, str(tmp_path / "stripped.pth")):
        model = deployed(cfg, file)
        assert model.head.bbox_pred is None and not model.training
        assert torch.equal(model.head.cls_score.weight, whole.head.cls_score.weight)
    del state["head.cls_score.bias"]
    torch.save({"model": state}, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="broken.pth does not fit.*\n.*\n.*head.cls_score: bias"):
        deployed(cfg, str(tmp_path / "broken.pth"))


@pytest.mark.parametrize(
    "kind, short, longest, size",
    [
        ("RetinaNet", 800, 1333, (800, 1333)),
        ("RetinaNet", 128, 128, (128, 128)),
        ("RetinaNet", 320, 9999, (320, 320)),
        ("SSD", 800, 1333, (128, 128)),
    ],
)
def test_size_of_test_images(kind, short, longest, size):
    sizes = {"INPUT.MIN_SIZE_TEST": short, "INPUT.MAX_SIZE_TEST": longest}
    assert image_size_of(tiny_cfg(kind, **sizes)) == size


def test_no_size_of_test_images():
    with pytest.raises(ValueError, match="MIN_SIZE_TEST is 0"):
        image_size_of(tiny_cfg("RetinaNet", **{"INPUT.MIN_SIZE_TEST": 0}))
