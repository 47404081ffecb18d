"""RoIBatch and the sources of two-stage students: what the student's own head saw and made."""

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from kd_d2.distillation import DistillationContext, StudentView, build_tap
from kd_d2.projects.gdetkd.records import RoIBatch, build_student_rois, student_family
from tests.fixtures import TWO_STAGE, tiny_batch, tiny_cfg, tiny_model

K = 3


def rows(num=5):
    """Two images with 2 and 3 RoIs."""
    return RoIBatch(
        boxes=[Boxes(torch.arange(8.0).view(2, 4)), Boxes(torch.arange(12.0).view(3, 4) + 8)],
        gt_classes=torch.tensor([0, 3, 3, 2, -1]),
        gt_boxes=torch.arange(20.0).view(5, 4) + 100,
        num_classes=K,
        embed=torch.arange(5.0)[:, None].requires_grad_(),
        anchor=torch.arange(5),
        cls=torch.arange(20.0).view(5, 4),
    )


def test_positive_counts_and_selection():
    batch = rows()
    assert batch.positive.tolist() == [True, False, False, True, False]
    assert batch.counts == [2, 3]
    chosen = batch.select(torch.tensor([False, True, True, False, True]))
    assert [b.tensor[:, 0].tolist() for b in chosen.boxes] == [[4], [8, 16]]
    assert chosen.counts == [1, 2]
    assert chosen.gt_classes.tolist() == [3, 3, -1] and chosen.anchor.tolist() == [1, 2, 4]
    assert chosen.gt_boxes[:, 0].tolist() == [104, 108, 116]
    assert chosen.cls[:, 0].tolist() == [4, 8, 16]
    assert chosen.box is None and chosen.anchors is None and chosen.num_classes == K
    chosen.embed.sum().backward()
    assert batch.embed.grad.flatten().tolist() == [0, 1, 1, 0, 1]
    # the batch itself stays whole
    assert batch.counts == [2, 3] and len(batch.embed) == 5


def test_selection_of_nothing():
    none = rows().select(torch.zeros(5, dtype=torch.bool))
    assert none.counts == [0, 0] and none.embed.shape == (0, 1)
    assert [b.tensor.shape for b in none.boxes] == [(0, 4), (0, 4)]


def context(family, num_gt=(3, 2), **overrides):
    """RoIs of a student's training forward, and the context that they come from."""
    model, cfg = tiny_model(family, **overrides), tiny_cfg(family, **overrides)
    tap = build_tap(model)
    source = build_student_rois(cfg, tap.keys(model))
    batch = tiny_batch(num_gt=num_gt)
    seed_all_rng(0)
    with EventStorage(), tap.observe(model, source.student_needs) as seen:
        model(batch)
    seen.gt_instances = [x["instances"] for x in batch]
    ctx = DistillationContext(
        batched_inputs=batch,
        gt_instances=seen.gt_instances,
        padded_size=(128, 128),
        student=StudentView(seen),
        teacher=None,
        iteration=0,
    )
    return source, ctx


@pytest.mark.parametrize("family", TWO_STAGE)
def test_two_stage(family):
    source, ctx = context(family)
    batches = source(ctx)
    assert source(ctx) is batches  # one list a step, whose boxes the teacher's pass is cached by
    assert len(batches) == source.num_stages == (3 if family == "Cascade" else 1)
    for stage, batch in enumerate(batches):
        R = len(batch.gt_classes)
        assert batch.stage == stage and batch.num_classes == K and len(batch.boxes) == 2
        assert sum(batch.counts) == R == len(batch.gt_boxes) > 30
        assert max(batch.counts) <= source.rois_per_image == 24
        assert batch.embed.shape == (R, source.embed_dims[stage])
        assert batch.cls.shape == (R, K + 1)
        assert batch.box.shape == (R, 4 if family == "Cascade" else 4 * K)
        assert all(not b.tensor.requires_grad for b in batch.boxes)
        assert batch.embed.requires_grad and batch.cls.requires_grad and batch.box.requires_grad
        # labels belong to the boxes: a foreground row overlaps its own ground truth
        boxes = torch.cat([b.tensor for b in batch.boxes])
        iou = pairwise_iou(Boxes(boxes), Boxes(batch.gt_boxes)).diagonal()
        threshold = (0.5, 0.6, 0.7)[stage]
        assert (iou[batch.positive] >= threshold).all() and batch.positive.any()
        assert (iou[~batch.positive] < threshold).all()
        # the very outputs of the predictor
        predictor = ctx.student.model.roi_heads.box_predictor
        predictor = predictor[stage] if family == "Cascade" else predictor
        torch.testing.assert_close(predictor(batch.embed)[0], batch.cls)


@pytest.mark.parametrize("family", TWO_STAGE)
def test_images_without_ground_truth(family):
    for batch in (b for source, ctx in [context(family, 0)] for b in source(ctx)):
        assert not batch.positive.any() and (batch.gt_classes == K).all()
        assert batch.gt_boxes.shape == (len(batch.gt_classes), 4) and len(batch.embed) > 0


def test_family_of_a_student():
    for family in ("RetinaNet", "C4"):
        model = tiny_model(family)
        expected = "dense" if family == "RetinaNet" else "two_stage"
        assert student_family(build_tap(model).keys(model)) == expected
    with pytest.raises(ValueError, match="two-stage student .* or a dense one"):
        student_family({"neck": None})
