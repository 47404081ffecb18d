"""Inside-GT, main region and fine-grained imitation: which cells count, worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from kd_d2.baselines import FineGrained, InsideGT, MainRegion
from kd_d2.blocks.regions import GTCentre, NearAnchor
from kd_d2.distillation import Assignment
from tests.baselines.feature_cases import (
    ToyContext,
    kd_model,
    level_keys,
    networks,
    run_step,
    single_anchor_view,
    terms_of,
)
from tests.fixtures import tiny_batch, tiny_cfg

KEYS = level_keys(assign=SimpleNamespace())
METHODS = {"InsideGT": InsideGT, "MainRegion": MainRegion, "FineGrained": FineGrained}


def _difference():
    """Student - teacher of every cell (y, x) is 1 + y + 4x on the first channel, 0 on the other."""
    student = torch.zeros(1, 2, 4, 4)
    student[0, 0] = 1 + torch.arange(4.0)[:, None] + 4 * torch.arange(4.0)
    return student


def _value(cls, cells, **options):
    """Return (loss, mean over ``cells`` (y, x) of the squared difference, by hand)."""
    distiller = cls(student_keys=KEYS, teacher_keys=KEYS, weight=1.0, **options)
    student = _difference()
    labels = torch.ones(1, 16, dtype=torch.int64)
    labels[0, 6] = 0  # cell (1, 2)
    view = single_anchor_view({"neck": [student], "assign": Assignment(labels, None, 1)})
    ctx = ToyContext(view, {"neck": [torch.zeros_like(student)]}, [[(0, 0, 24, 24)]])
    expected = sum((1 + y + 4 * x) ** 2 for y, x in cells) / (2 * len(cells))
    return distiller(ctx)["feat"].item(), expected


def test_inside_gt():
    found, expected = _value(
        InsideGT, [(y, x) for y in range(3) for x in range(3)], region=GTCentre()
    )
    assert found == pytest.approx(expected)


def test_fine_grained():
    """IoU: centre .444, edges .3, diagonals .209: above half of the largest is a plus."""
    plus = [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]
    found, expected = _value(FineGrained, plus, region=NearAnchor(0.5))
    assert found == pytest.approx(expected)
    square = [(y, x) for y in range(3) for x in range(3)]
    found, expected = _value(FineGrained, square, region=NearAnchor(0.3))
    assert found == pytest.approx(expected)


def test_main_region():
    region = MainRegion.make_region(None)
    found, expected = _value(MainRegion, [(1, 2)], region=region)
    assert found == pytest.approx(expected)


def _mean_over_mask(ours, theirs, masks):
    total = 0.0
    for s, t, mask in zip(ours, theirs, masks):
        rows = (s - t).square().permute(0, 2, 3, 1)[mask.bool()]
        total += rows.mean() if len(rows) else 0.0
    return float(total)


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_main_region_of_a_real_network(arch):
    """Positives of the detector's own matcher, counted anchor by anchor."""
    student, teacher = networks(arch)
    batch = tiny_batch()
    found = terms_of(run_step(kd_model("MainRegion", student, teacher, arch), batch))["feat"]
    with torch.no_grad():
        sides, masks = [], []
        for network in (student, teacher.model):
            images = network.preprocess_image(batch)
            features = network.backbone(images.tensor)
            if arch == "RetinaNet":
                names = anchor_names = network.head_in_features
            else:
                names = network.roi_heads.box_in_features
                anchor_names = network.proposal_generator.in_features
            sides.append([features[f] for f in names])
        features = student.backbone(student.preprocess_image(batch).tensor)
        gt = [x["instances"] for x in batch]
        if arch == "RetinaNet":
            anchors = student.anchor_generator([features[f] for f in anchor_names])
            labels = torch.stack(student.label_anchors(anchors, gt)[0])
            positive = (labels >= 0) & (labels < 3)
        else:
            rpn = student.proposal_generator
            anchors = rpn.anchor_generator([features[f] for f in anchor_names])
            from detectron2.structures import Boxes, pairwise_iou

            every = Boxes.cat(anchors)
            positive = torch.stack(
                [rpn.anchor_matcher(pairwise_iou(x.gt_boxes, every))[1] == 1 for x in gt]
            )
        start = 0
        for boxes, side in zip(anchors, sides[0]):
            part = positive[:, start : start + len(boxes)]
            masks.append(part.reshape(len(gt), *side.shape[-2:], -1).any(-1))
            start += len(boxes)
    assert sum(mask.sum() for mask in masks) > 0
    assert found.item() == pytest.approx(2.0 * _mean_over_mask(*sides, masks), rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_official_weight_and_no_adapter(name):
    node = tiny_cfg("GFL").KD[name.upper()]
    assert node.WEIGHT == 2.0 and node.ADAPTER == "none"
    distiller = kd_model(name, *networks()).distillers[name.lower()]
    assert distiller.weights == {"feat": 2.0} and not list(distiller.parameters())


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("InsideGT", {"ADAPTER": "linear"}, "KD.INSIDEGT.ADAPTER must be one of .*'linear'"),
        ("FineGrained", {"THRESHOLD": 1.0}, r"KD.FINEGRAINED.THRESHOLD must be in \[0, 1\), got 1"),
    ],
)
def test_values_that_cannot_work(name, options, message):
    with pytest.raises(ValueError, match=message):
        kd_model(name, *networks(), **options)
