"""RoIs of dense students, against loops over levels, cells and anchors."""

import math

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.env import seed_all_rng

from kd_d2.distillation import KeyInfo, build_tap
from kd_d2.projects.gdetkd.dense_rois import DENSE_BRANCHES, DenseRoIs
from kd_d2.projects.gdetkd.records import build_student_rois
from tests.blocks.support import ToyCodec, ToyView, observed, toy_ctx
from tests.fixtures import CLASSES, DENSE, tiny_batch, tiny_cfg, tiny_model

K = len(CLASSES)
EVERYTHING = {"KD.GDETKD.DENSE.NUM_SAMPLES": 100_000, "KD.GDETKD.HETERO_PRED.CLS": "bce"}


def source_of(name, student, **overrides):
    return build_student_rois(tiny_cfg(name, **overrides), build_tap(student).keys(student))


def collected(name, batch, student=None, **overrides):
    """Student, context, source and the batch of RoIs of one step."""
    student = student or tiny_model(name)
    source = source_of(name, student, **overrides)
    ctx = observed(student, batch, source.student_needs)
    seed_all_rng(3)
    (rois,) = source(ctx)
    return student, ctx, source, rois


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return shared / (sum(areas) - shared)


def by_loops(ctx, source, image, anchors_per_cell, pos_iou=0.5):
    """Every box of an image that is not empty, in a loop over levels, cells and anchors."""
    codec, (height, width) = ctx.student["codec"], ctx.image_sizes[image]
    targets = ctx.gt_instances[image]
    result = []
    for level, (cls, raw) in enumerate(zip(ctx.student["pred.cls"], ctx.student["pred.box"])):
        dim, anchors = raw.shape[1] // anchors_per_cell, iter(ctx.student["anchors"][level].tensor)
        for y in range(raw.shape[2]):
            for x in range(raw.shape[3]):
                for a in range(anchors_per_cell):
                    anchor = next(anchors)
                    deltas = raw[image, a * dim : (a + 1) * dim, y, x].detach()
                    box = codec.apply_deltas(deltas[None], anchor[None])[0].tolist()
                    box = [min(max(v, 0.0), (width, height)[i % 2]) for i, v in enumerate(box)]
                    if box[2] <= box[0] or box[3] <= box[1]:
                        continue
                    ious = [iou(box, gt) for gt in targets.gt_boxes.tensor.tolist()]
                    best = max(range(len(ious)), key=ious.__getitem__, default=None)
                    found = best is not None and ious[best] >= pos_iou
                    result.append(
                        {
                            "box": box,
                            "class": int(targets.gt_classes[best]) if found else K,
                            "gt": targets.gt_boxes.tensor[best].tolist() if ious else [0.0] * 4,
                            "cell": (level, y, x),
                            "anchor": a,
                            "anchor_box": anchor.tolist(),
                            "logits": cls[image, a * K : (a + 1) * K, y, x],
                            "deltas": deltas,
                        }
                    )
    return result


def matched_rows(rois, image, expected):
    """Pairs (row of ``rois``, entry of ``expected``) by box; all of them, each once."""
    first = sum(rois.counts[:image])
    boxes = rois.boxes[image].tensor
    assert len(boxes) == len(expected)
    left = {}
    for e in expected:
        left.setdefault((e["anchor"], *e["logits"].tolist()), []).append(e)
    pairs = []
    for i, box in enumerate(boxes):
        row = first + i
        (e,) = left.pop((int(rois.anchor[row]), *rois.cls[row].tolist()))
        torch.testing.assert_close(box, torch.tensor(e["box"]), atol=1e-3, rtol=1e-5)
        pairs.append((row, e))
    assert not left
    return pairs


@pytest.mark.parametrize("name", DENSE)
def test_equals_loops_with_odd_sizes_and_an_image_without_ground_truth(name):
    batch = tiny_batch(3, sizes=((35, 61), (32, 32), (51, 30)), num_gt=(3, 0, 2))
    _, ctx, source, rois = collected(name, batch, **EVERYTHING)
    per_cell = 4 if name == "RetinaNet" else 1
    assert source.num_anchors == per_cell
    positives = 0
    for image in range(3):
        expected = by_loops(ctx, source, image, per_cell)
        for row, e in matched_rows(rois, image, expected):
            assert rois.gt_classes[row] == e["class"]
            torch.testing.assert_close(rois.gt_boxes[row], torch.tensor(e["gt"]))
            torch.testing.assert_close(rois.anchors[row], torch.tensor(e["anchor_box"]))
            assert torch.equal(rois.box[row], e["deltas"])
            positives += e["class"] < K
    assert rois.positive.sum() == positives


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("branch", sorted(DENSE_BRANCHES))
def test_embedding_is_the_input_of_the_output_layer_at_the_cell(name, branch):
    batch = tiny_batch(2, sizes=((35, 61), (64, 32)))
    student, ctx, source, rois = collected(
        name, batch, **{**EVERYTHING, "KD.GDETKD.CKD.DENSE_BRANCH": branch}
    )
    images = student.preprocess_image(batch).tensor
    features = student.backbone(images)
    subnets = {"cls": student.head.cls_subnet, "loc": student.head.bbox_subnet}
    chosen = list(subnets.values()) if branch == "sum" else [subnets[branch]]
    levels = [sum(net(features[f]) for net in chosen) for f in student.head_in_features]
    per_cell = source.num_anchors
    for image in range(2):
        for row, e in matched_rows(rois, image, by_loops(ctx, source, image, per_cell))[::7]:
            level, y, x = e["cell"]
            torch.testing.assert_close(rois.embed[row], levels[level][image, :, y, x])
    assert source.embed_dims == tuple(rois.embed.shape[1:])


def test_location_and_anchor_of_an_index_at_800x1344():
    """Specification, item 11: location = idx div 9, anchor = idx mod 9."""
    strides = (8, 16, 32, 64, 128)
    sizes = [[4 * s * 2 ** (i / 3) for i in range(3)] for s in strides]
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=list(strides), offset=0.0
    )
    shapes = [(math.ceil(800 / s), math.ceil(1344 / s)) for s in strides]
    assert shapes[0] == (100, 168) and shapes[-1] == (7, 11)
    anchors = generator([torch.zeros(1, 1, *shape) for shape in shapes])
    assert [len(a) for a in anchors] == [151_200, 37_800, 9_450, 2_457, 693]
    # a cell's feature is (level, y, x)
    cells = [
        torch.stack(
            [torch.full(s, float(level)), *torch.meshgrid(*map(torch.arange, s), indexing="ij")]
        )[None].float()
        for level, s in enumerate(shapes)
    ]
    codec = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    student = ToyView(
        {
            "anchors": anchors,
            "codec": codec,
            "pred.cls": [torch.zeros(1, 9 * 2, *s) for s in shapes],
            "pred.box": [torch.zeros(1, 9 * 4, *s) for s in shapes],
            "head.cls[1]": cells,
        }
    )
    keys = {
        "pred.cls": KeyInfo(18, strides, (2,)),
        "pred.box": KeyInfo(36, strides),
        "head.cls[0]": KeyInfo(3, strides),
        "head.cls[1]": KeyInfo(3, strides),
    }
    source = DenseRoIs(student_keys=keys, num_samples=3000, outputs=True)
    ctx = toy_ctx([[[100, 100, 228, 228], [600, 300, 700, 500]]], [(800, 1333)], student)
    seed_all_rng(0)
    (rois,) = source(ctx)
    assert len(rois.gt_classes) == 3000 and rois.positive.any()
    level, y, x = rois.embed.long().unbind(1)
    stride = torch.tensor(strides)[level]
    centres = (rois.anchors[:, :2] + rois.anchors[:, 2:]) / 2
    torch.testing.assert_close(centres, torch.stack([x * stride, y * stride], dim=1).float())
    sides = rois.anchors[:, 2:] - rois.anchors[:, :2]
    cell = torch.stack([c for c in generator.cell_anchors])[level, rois.anchor]
    torch.testing.assert_close(sides, cell[:, 2:] - cell[:, :2], rtol=1e-4, atol=1e-3)
    # raw numbers 0 are the anchors themselves, clipped to the image before padding
    limit = torch.tensor([1333.0, 800.0, 1333.0, 800.0])
    clipped = torch.minimum(rois.anchors.clamp(min=0), limit)
    torch.testing.assert_close(rois.boxes[0].tensor, clipped, atol=1e-3, rtol=1e-5)
    best = pairwise_iou(ctx.gt_instances[0].gt_boxes, rois.boxes[0]).amax(dim=0)
    assert torch.equal(best >= 0.5, rois.positive)


def test_gradients_reach_tower_and_trunk_but_neither_boxes_nor_output_layers():
    student, _, _, rois = collected("RetinaNet", tiny_batch())
    assert not any(b.tensor.requires_grad for b in rois.boxes) and rois.cls is None
    rois.embed.square().sum().backward()
    touched = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("head.cls_subnet") for n in touched)
    assert any(n.startswith("backbone.fpn_output3") for n in touched)
    assert not any(n.startswith(("head.cls_score", "head.bbox")) for n in touched)


def test_outputs_have_gradients_of_their_own_cells_only():
    student, ctx, _, rois = collected("RetinaNet", tiny_batch(), **EVERYTHING)
    ctx.student["pred.box"][1].retain_grad()
    chosen = int((rois.positive).nonzero()[0])
    (rois.box[chosen] * torch.arange(1.0, 5.0)).sum().backward()
    levels = [x.grad for x in ctx.student["pred.box"][1:2] if x.grad is not None]
    assert sum(int((g != 0).sum()) for g in levels) in (0, 4)


@pytest.mark.parametrize("strict, expected", [(False, (8, 24)), (True, (8, 24))])
def test_enough_foreground(strict, expected):
    rois = sampled(strict=strict, num_samples=32, positives=20, negatives=200)
    assert rois == expected


@pytest.mark.parametrize("strict, expected", [(False, (3, 29)), (True, (3, 9))])
def test_too_little_foreground(strict, expected):
    assert sampled(strict=strict, num_samples=32, positives=3, negatives=200) == expected


@pytest.mark.parametrize("strict, expected", [(False, (0, 32)), (True, (0, 0))])
def test_no_foreground(strict, expected):
    assert sampled(strict=strict, num_samples=32, positives=0, negatives=200) == expected


def sampled(strict, num_samples, positives, negatives):
    """(foreground, background) boxes sampled from so many, on one level of cells of 8 pixels."""
    count = positives + negatives
    base = torch.tensor([[0.0, 0.0, 8.0, 8.0]]).repeat(count, 1)
    base[positives:] += 100
    deltas = (base - torch.zeros(count, 4)).T.reshape(1, 4, 1, count)
    student = ToyView(
        {
            "anchors": [Boxes(torch.zeros(count, 4))],
            "codec": ToyCodec(),
            "pred.cls": [torch.zeros(1, 2, 1, count)],
            "pred.box": [deltas],
            "head.cls[0]": [torch.zeros(1, 5, 1, count, requires_grad=True)],
        }
    )
    source = DenseRoIs(student_keys=_KEYS, num_samples=num_samples, strict_ratio=strict)
    (rois,) = source(toy_ctx([[[0, 0, 8, 8]]], [(128, 128)], student))
    # foreground first, no box twice
    assert not rois.positive.int().diff().gt(0).any()
    return int(rois.positive.sum()), int((~rois.positive).sum())


_KEYS = {
    "pred.cls": KeyInfo(2, (8,), (2,)),
    "pred.box": KeyInfo(4, (8,)),
    "head.cls[0]": KeyInfo(5, (8,)),
    "head.box[0]": KeyInfo(7, (8,)),
}


def test_iou_of_the_threshold_is_foreground_and_below_it_background():
    for pos_iou, positive in ((0.5, True), (0.51, False)):
        student = ToyView(
            {
                "anchors": [Boxes(torch.tensor([[0.0, 0.0, 8.0, 8.0]]))],
                "codec": ToyCodec(),
                "pred.cls": [torch.zeros(1, 2, 1, 1)],
                "pred.box": [torch.zeros(1, 4, 1, 1)],
                "head.cls[0]": [torch.zeros(1, 5, 1, 1)],
            }
        )
        source = DenseRoIs(student_keys=_KEYS, pos_iou=pos_iou, pos_fraction=1.0)
        (rois,) = source(toy_ctx([[[0, 0, 4, 8]]], [(128, 128)], student))
        assert rois.positive.tolist() == [positive]


def test_low_quality_matches_stay_background():
    """The box with the highest IoU of a ground truth is foreground only above the threshold."""
    assert sampled(False, 32, 0, 50) == (0, 32)


def test_fcos_with_no_box_at_all_gives_empty_rows_with_a_graph():
    student = tiny_model("FCOS", **{"MODEL.FCOS.PRESET": "d2"})
    with torch.no_grad():
        # relu of a large negative number: every box has no width
        student.head.bbox_pred.weight.zero_()
        student.head.bbox_pred.bias.fill_(-1.0)
    _, _, _, rois = collected(
        "FCOS", tiny_batch(), student, **{"MODEL.FCOS.PRESET": "d2"}, **EVERYTHING
    )
    assert rois.counts == [0, 0] and rois.embed.shape == (0, 64) and rois.cls.shape == (0, K)
    rois.embed.sum().backward()
    assert student.head.cls_subnet[0].weight.grad is not None


def test_fcos_with_no_positive_gives_background_only():
    student = tiny_model("FCOS", **{"MODEL.FCOS.PRESET": "d2"})
    with torch.no_grad():
        student.head.bbox_pred.weight.zero_()
        student.head.bbox_pred.bias.fill_(0.01)
    _, _, _, rois = collected("FCOS", tiny_batch(), student, **{"MODEL.FCOS.PRESET": "d2"})
    assert not rois.positive.any() and len(rois.gt_classes) > 100


def test_same_rois_for_all_terms_of_a_step():
    student = tiny_model("RetinaNet")
    source = source_of("RetinaNet", student)
    ctx = observed(student, tiny_batch(), source.student_needs)
    assert source(ctx)[0] is source(ctx)[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"branch": "both"}, "DENSE_BRANCH must be one of"),
        ({"branch": "sum"}, "5 and 7 channels"),
        ({"num_samples": 0}, "NUM_SAMPLES must be at least 1, got 0"),
        ({"pos_fraction": 1.5}, r"POS_FRACTION must be in \(0, 1\], got 1.5"),
        ({"pos_iou": 0.0}, r"POS_IOU must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DenseRoIs(student_keys=_KEYS, **arguments)
