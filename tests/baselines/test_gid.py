"""GID against torchvision's RoIAlign, loops over anchors and hand-computed numbers."""

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from kd_d2.blocks import Pair, PairwiseDistance, Vectors
from tests.baselines.feature_cases import kd_model, networks, run_step, terms_of
from tests.baselines.prediction_cases import check_two_steps, gradients_reach, predictions
from tests.fixtures import DENSE, teacher_of, tiny_batch, tiny_model

TERMS = ("feat", "rel", "cls", "box")
# weights of 1: the formulas are checked without the port's numbers
PLAIN = {f"{name.upper()}_WEIGHT": 1.0 for name in TERMS}


def _relation(student, teacher, sizes):
    pair = Pair(
        torch.tensor(student, dtype=torch.float64).reshape(-1, 2),
        torch.tensor(teacher, dtype=torch.float64).reshape(-1, 2),
        False,
        rois=[Boxes(torch.zeros(n, 4)) for n in sizes],
    )
    return PairwiseDistance()(None, pair)


def test_relations_worked_out():
    teacher = [[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]
    assert _relation([[2 * x for x in row] for row in teacher], teacher, [3]).sum() == 0
    moved = [[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]
    assert _relation(moved, teacher, [3]).sum().item() == pytest.approx(0.1875)
    # images by themselves; fewer than three boxes have no relations
    values = _relation(moved + moved[:2], teacher + [[5.0, 5.0], [0.0, 9.0]], [3, 2])
    assert values.shape == (5,) and values[:3].sum().item() == pytest.approx(0.1875)
    assert not values[3:].any() and len(_relation(moved[:0], teacher[:0], [0, 0])) == 0


def test_relations_of_equal_rows_have_finite_gradients():
    rows = torch.zeros(3, 2, requires_grad=True)
    boxes = [Boxes(torch.zeros(3, 4))]
    pair = Pair(rows, torch.rand(3, 2), False, rois=boxes)
    PairwiseDistance()(None, pair).sum().backward()
    assert rows.grad.isfinite().all()
    maps = Pair(torch.rand(3, 2, 4, 4), torch.rand(3, 2, 4, 4), True, rois=boxes)
    assert Vectors()(maps).student.shape == (3, 32) and Vectors()(maps).rois is boxes


def _instances(ours, theirs, codec, image, size, num=10, iou=0.3):
    """General instances of an image, from the definition."""
    s, t = ours["cls"][image].sigmoid(), theirs["cls"][image].sigmoid()
    score, label = (t - s).abs().max(dim=1)
    boxes = []
    for r, c in enumerate(label.tolist()):
        side = theirs if t[r, c] > s[r, c] else ours
        boxes.append(codec.apply_deltas(side["box"][image, r][None], ours["anchors"][r][None])[0])
    boxes = torch.stack(boxes)
    kept = boxes[nms(boxes, score, iou)[:num]]
    kept[:, 0::2] = kept[:, 0::2].clamp(0, size[1])
    kept[:, 1::2] = kept[:, 1::2].clamp(0, size[0])
    sides = kept[:, 2:] - kept[:, :2]
    return kept[(sides > 1).all(dim=1)]


def _pooled(maps, image, box):
    area = (box[2] - box[0]) * (box[3] - box[1])
    level = min(max(math.floor(4 + math.log2(math.sqrt(area) / 224 + 1e-8)), 3), 7)
    row = torch.tensor([[image, *box]])
    return roi_align(maps[level - 3], row, 10, 1 / 2**level, 2, aligned=True)[0]


@pytest.mark.parametrize("arch", ["GFL", "FCOS", "RetinaNet"])
def test_follows_the_definition(arch):
    student, teacher = networks(arch)
    batch = tiny_batch()
    model = kd_model("GID", student, teacher, arch, ADAPTER=False, **PLAIN)
    terms = terms_of(run_step(model, batch))
    ours, theirs = (predictions(m, batch) for m in (student, teacher.model))
    codec, strides = student.box2box_transform, [8, 16, 32, 64, 128]
    features, relations, positive = [], [], []
    for n, x in enumerate(batch):
        boxes = _instances(ours, theirs, codec, n, x["image"].shape[-2:])
        assert 3 <= len(boxes) <= 10
        rows = [
            torch.stack([_pooled(p["maps"], n, b) for b in boxes.tolist()]) for p in (ours, theirs)
        ]
        features.append((rows[0] - rows[1]).square().sum(dim=1).flatten())
        distances = []
        for side in rows:
            flat = side.flatten(1).double()
            d = torch.tensor([[(a - b).norm().item() for b in flat] for a in flat])
            k = len(flat)
            distances.append(d / (d.sum() / (k * k - k)))
        relations.append(F.smooth_l1_loss(*distances, reduction="sum") / (k * k - k))
        if arch == "FCOS":
            centers = (ours["anchors"][:, :2] + ours["anchors"][:, 2:]) / 2
            inside = [
                any(b[0] < cx < b[2] and b[1] < cy < b[3] for b in boxes.tolist())
                for cx, cy in centers.tolist()
            ]
            positive.append(torch.tensor(inside))
        else:
            targets = Instances(
                tuple(x["image"].shape[-2:]),
                gt_boxes=Boxes(boxes),
                gt_classes=torch.ones(len(boxes), dtype=torch.int64),
            )
            levels = [Boxes(a) for a in ours["anchors"].split(ours["sizes"])]
            assert [len(a) for a in levels][-1] == len(levels[-1]) and len(strides) == len(levels)
            positive.append(student.label_anchors(levels, [targets])[0][0] == 1)
    assert terms["feat"].item() == pytest.approx(torch.cat(features).mean().item(), rel=1e-3)
    assert terms["rel"].item() == pytest.approx(sum(relations).item() / 2, rel=1e-3)
    mask = torch.stack(positive)
    assert 0 < mask.sum() < mask.numel()
    p, q = ours["cls"][mask].double().sigmoid(), theirs["cls"][mask].double().sigmoid()
    bce = -(q * p.log() + (1 - q) * (1 - p).log()).sum() / mask.sum()
    assert terms["cls"].item() == pytest.approx(bce.item(), rel=1e-3)
    s, t = ours["box"][mask], theirs["box"][mask]
    if arch == "GFL":
        s, t = (codec.distances(x) for x in (s, t))
    assert terms["box"].item() == pytest.approx(((s - t).abs().sum() / mask.sum()).item(), rel=1e-3)


@pytest.mark.parametrize("arch", DENSE)
@pytest.mark.parametrize("num_gt", [(3, 2), 0])
def test_two_steps(arch, num_gt):
    student, teacher = networks(arch)
    model = kd_model("GID", student, teacher, arch)
    assert {n for n, _ in model.distillers.named_parameters()} == {
        "gid.adapter.layers.0.weight",
        "gid.adapter.layers.0.bias",
    }
    check_two_steps(model, teacher, tiny_batch(num_gt=num_gt))


def test_gradients():
    student, teacher = networks("GFL")
    model = kd_model("GID", student, teacher)
    terms = terms_of(run_step(model, tiny_batch()))
    for name in ("feat", "rel"):
        found = gradients_reach(terms[name], model)
        assert "distillers.gid.adapter.layers.0.weight" in found
        assert any("fpn_output" in n for n in found)
        assert not any(n.startswith("student.head.") for n in found)
    assert "student.head.bbox_pred.weight" not in gradients_reach(terms["cls"], model)
    assert "student.head.bbox_pred.weight" in gradients_reach(terms["box"], model)


def test_student_that_is_its_teacher():
    """Nothing differs, hence the boxes are arbitrary; what is compared there is equal."""
    student, teacher = tiny_model("GFL", 0), teacher_of(tiny_model("GFL", 0))
    model = kd_model("GID", student, teacher, ADAPTER=False)
    terms = terms_of(run_step(model, tiny_batch()))
    assert terms["feat"] == terms["rel"] == terms["box"] == 0 and terms["cls"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    student, teacher = networks("GFL")
    model = kd_model("GID", student, teacher)
    with torch.autocast("cpu", dtype):
        terms = terms_of(run_step(model, tiny_batch()))
    assert set(terms) == set(TERMS)
    assert all(v.dtype == torch.float32 and v.isfinite() and v > 0 for v in terms.values())


def test_errors():
    student, teacher = networks("GFL")
    with pytest.raises(ValueError, match="KD.GID.TERMS"):
        kd_model("GID", student, teacher, TERMS=("feat", "mask"))
    with pytest.raises(ValueError, match="num <= candidates"):
        kd_model("GID", student, teacher, NUM=10, CANDIDATES=5)
    with pytest.raises(ValueError, match="both must be dense"):
        kd_model("GID", *networks("GeneralizedRCNN"), "GeneralizedRCNN")
