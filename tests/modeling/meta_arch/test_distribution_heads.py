"""ATSS and FCOS whose boxes are distributions (REG_MAX), against a plain computation."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from kd_d2.modeling.layers import DistributionBox2BoxTransform
from tests.baselines.prediction_cases import predictions
from tests.fixtures import tiny_batch, tiny_model


def _model(arch, reg_max=8, **options):
    overrides = {f"MODEL.{arch}.REG_MAX": reg_max, **options}
    return tiny_model(arch, 0, **overrides)


@pytest.mark.parametrize(
    "arch, options",
    [("ATSS", {}), ("FCOS", {}), ("FCOS", {"MODEL.FCOS.PRESET": "d2"})],
)
def test_losses(arch, options):
    model, batch = _model(arch, **options), tiny_batch()
    found = predictions(model, batch)
    with EventStorage(0):
        losses = model(batch)
    name = arch.lower()
    extra = f"loss_{name}_dfl"
    assert extra in losses
    stride_of = {"ATSS": 8.0, "FCOS": 1.0}[arch]
    dfl, iou_part, weights = [], [], []
    for n, r in found["positive"].nonzero().tolist():
        anchor, gt = found["anchors"][r], found["matched"][n, r]
        stride = (anchor[2] - anchor[0]) / stride_of
        center = (anchor[:2] + anchor[2:]) / 2
        target = torch.cat([center - gt[:2], gt[2:] - center]) / stride
        weights.append(
            (
                (min(target[0], target[2]) / max(target[0], target[2]))
                * (min(target[1], target[3]) / max(target[1], target[3]))
            ).sqrt()
        )
        logits = found["box"][n, r].view(4, 9)
        expected = (logits.softmax(1) * torch.arange(9.0)).sum(1) * stride
        box = torch.cat([center - expected[:2], center + expected[2:]])
        w, h = (min(box[k + 2], gt[k + 2]) - max(box[k], gt[k]) for k in (0, 1))
        inter = max(w, torch.zeros(())) * max(h, torch.zeros(()))
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, gt)]
        iou = inter / (sum(areas) - inter)
        hull = [max(box[k + 2], gt[k + 2]) - min(box[k], gt[k]) for k in (0, 1)]
        hull = hull[0] * hull[1]
        giou = iou - (hull - (sum(areas) - inter)) / hull
        iou_part.append(1 - giou)
        side = []
        for row, y in zip(logits, target.clamp(0, 8 - 0.1).tolist()):
            low = int(y)
            pair = torch.tensor([low, low + 1])
            mass = torch.tensor([low + 1 - y, y - low])
            side.append(-(mass * F.log_softmax(row, 0)[pair]).sum())
        dfl.append(torch.stack(side).mean())
    dfl, weights = torch.stack(dfl), torch.stack(weights)
    if "d2" in options.values():
        weights = torch.ones_like(weights)
        divisor = 300 * 0.9 + 0.1 * len(dfl)
    else:
        divisor = max(weights.sum().item(), 1 if arch == "ATSS" else 1e-6)
    expected = 0.25 * (dfl * weights).sum() / divisor
    assert losses[extra].item() == pytest.approx(expected.item(), rel=1e-4)
    if arch == "ATSS":
        expected = 2 * (torch.stack(iou_part) * weights).sum() / divisor
        assert losses["loss_atss_box"].item() == pytest.approx(expected.item(), rel=1e-4)
    sum(losses.values()).backward()
    assert model.head.bbox_pred.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("arch", ["ATSS", "FCOS"])
def test_without_ground_truth_and_inference(arch):
    model = _model(arch)
    with EventStorage(0):
        losses = model(tiny_batch(num_gt=0))
    assert losses[f"loss_{arch.lower()}_dfl"].item() == 0
    assert all(value.isfinite() for value in losses.values())
    threshold = getattr(model, "test_score_thresh")
    assert 0 <= threshold < 1
    with torch.no_grad():
        found = model.eval()(tiny_batch())
    boxes = found[0]["instances"].pred_boxes.tensor
    assert len(boxes) > 0 and (boxes[:, 2:] >= boxes[:, :2]).all()


@pytest.mark.parametrize("arch", ["ATSS", "FCOS"])
def test_off_by_default(arch):
    model = tiny_model(arch, 0)
    assert model.box2box_transform.box_dim == 4
    assert not isinstance(model.box2box_transform, DistributionBox2BoxTransform)
    assert model.head.bbox_pred.out_channels == 4
    with EventStorage(0):
        assert len(model(tiny_batch())) == 3
