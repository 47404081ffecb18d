"""Tap of two-stage detectors: proposals and RoI values against spies and recomputation."""

import copy
import functools

import pytest
import torch
from detectron2.layers import cat
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from kd_d2.distillation import KeyInfo, build_tap
from kd_d2.distillation.rcnn_tap import label_boxes
from tests.fixtures import tiny_batch, tiny_model

K = 3
FAMILIES = ("GeneralizedRCNN", "Cascade", "C4")
NUM_STAGES = {"GeneralizedRCNN": 1, "Cascade": 3, "C4": 1}
# Boxes between the thresholds occur, so that the stages label differently.
STRICTER = {"MODEL.ROI_BOX_CASCADE_HEAD.IOUS": (0.5, 0.875, 0.918)}
every_family = pytest.mark.parametrize("family", FAMILIES)


def _batch(num_gt=(3, 2)):
    return tiny_batch(sizes=[(96, 96), (64, 90)], num_gt=num_gt, seed=4)


class _Seen:
    """One training forward: what the tap says, and what the model's own methods returned."""

    def __init__(self, family, num_gt=(3, 2)):
        self.model = tiny_model(family, **(STRICTER if family == "Cascade" else {}))
        self.tap = build_tap(self.model)
        self.labelled = []  # proposals of stage 0, 1, ... as the model labelled them
        self.predicted = []  # outputs of the predictors, in order
        self._spy_on("label_and_sample_proposals")
        if family == "Cascade":
            self._spy_on("_match_and_label_boxes")
        heads = self.model.roi_heads
        predictors = heads.box_predictor if family == "Cascade" else [heads.box_predictor]
        handles = [
            p.register_forward_hook(lambda _, __, output: self.predicted.append(output))
            for p in predictors
        ]
        batch = _batch(num_gt)
        torch.manual_seed(0)  # of the sampling
        keys = list(self.tap.keys(self.model))
        with EventStorage(), self.tap.observe(self.model, keys) as self.values:
            self.losses = self.model(batch)
        self.values.gt_instances = [x["instances"] for x in batch]
        for handle in handles:
            handle.remove()

    def _spy_on(self, name):
        heads = self.model.roi_heads
        original = getattr(heads, name)

        def spy(*args):
            result = original(*args)
            # a copy: what the model does with its proposals afterwards must not matter
            self.labelled.append(copy.deepcopy(result))
            return result

        setattr(heads, name, spy)

    def __getitem__(self, key):
        return self.values[key]


@functools.lru_cache(None)
def _seen(family, num_gt=(3, 2)):
    return _Seen(family, num_gt)


@every_family
def test_keys_with_widths_and_strides(family):
    model = tiny_model(family)
    keys = build_tap(model).keys(model)
    if family == "C4":
        expected = {
            "backbone.res4": KeyInfo(256, (16,)),
            "neck.res4": KeyInfo(256, (16,)),
            "neck": KeyInfo(256, (16,)),
            "rpn.obj": KeyInfo(9, (16,)),  # 3 sizes, 3 aspect ratios
            "rpn.box": KeyInfo(36, (16,), ((1.0, 1.0, 1.0, 1.0),)),
            "assign": KeyInfo(None, (16,)),
        }
        anchor_sizes = [(16, 32, 64)]
        roi = (KeyInfo(256, (), (6, 6, "ROIAlignV2")), 512, 4 * K, (10.0, 10.0, 5.0, 5.0))
    else:
        strides = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
        widths = {"res2": (64, 4), "res3": (128, 8), "res4": (256, 16), "res5": (512, 32)}
        expected = {
            **{f"backbone.{name}": KeyInfo(c, (s,)) for name, (c, s) in widths.items()},
            **{f"neck.{name}": KeyInfo(32, (stride,)) for name, stride in strides.items()},
            "neck": KeyInfo(32, (4, 8, 16, 32)),  # what the RoI head pools from: no p6
            "rpn.obj": KeyInfo(3, tuple(strides.values())),
            "rpn.box": KeyInfo(12, tuple(strides.values()), ((1.0, 1.0, 1.0, 1.0),)),
            "assign": KeyInfo(None, tuple(strides.values())),
        }
        anchor_sizes = [(16,), (32,), (64,), (96,), (128,)]
        boxes = 4 if family == "Cascade" else 4 * K
        roi = (KeyInfo(32, (), (5, 5, "ROIAlignV2")), 48, boxes, (10.0, 10.0, 5.0, 5.0))
    codecs = [roi[3], (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)]
    for stage in range(NUM_STAGES[family]):
        for suffix in (f"[{stage}]", "") if stage == 0 else (f"[{stage}]",):
            expected[f"roi.feat{suffix}"] = roi[0]
            expected[f"roi.embed{suffix}"] = KeyInfo(roi[1])
            expected[f"roi.cls{suffix}"] = KeyInfo(K + 1)
            expected[f"roi.box{suffix}"] = KeyInfo(roi[2], (), (codecs[stage],))
            weights = keys[f"roi.codec{suffix}"].signature[-1]
            assert keys.pop(f"roi.codec{suffix}").signature[0] == "Box2BoxTransform"
            assert weights == ("weights", codecs[stage])
            expected[f"proposals{suffix}"] = KeyInfo()
    anchors = keys.pop("anchors")
    assert keys == expected
    assert anchors.channels is None and anchors.strides == keys["assign"].strides
    offset, *cells = anchors.signature
    assert offset == ("offset", 0.0) and len(cells) == len(anchor_sizes)
    for found, sizes in zip(cells, anchor_sizes):
        expected_cell = list(_cell_anchors(sizes))
        assert len(found) == len(expected_cell)
        for anchor, expected_anchor in zip(found, expected_cell):
            assert anchor == pytest.approx(expected_anchor, abs=2e-4)


def _cell_anchors(sizes):
    """Corners of the anchors of a cell, sizes and ratios (height / width) 0.5, 1, 2 in turn."""
    for size in sizes:
        for ratio in (0.5, 1.0, 2.0):
            width = size / ratio**0.5
            half = (width / 2, ratio * width / 2)
            yield (-half[0], -half[1], *half)


@every_family
def test_anchors_are_the_rpns_own_level_by_level(family):
    seen = _seen(family)
    rpn = seen.model.proposal_generator
    sizes = [level.shape[-2:] for level in seen["rpn.obj"]]
    assert len(seen["anchors"]) == len(sizes)
    strides = seen.tap.anchor_strides(seen.model)
    own = rpn.anchor_generator([torch.zeros(1, 1, *size) for size in sizes])
    for boxes, expected, (height, width), stride in zip(seen["anchors"], own, sizes, strides):
        assert torch.equal(boxes.tensor, expected.tensor)
        centres = boxes.get_centers().view(height, width, -1, 2)
        x, y = torch.arange(width) * float(stride), torch.arange(height) * float(stride)
        assert torch.equal(centres[..., 0], x[None, :, None].expand(centres.shape[:3]))
        assert torch.equal(centres[..., 1], y[:, None, None].expand(centres.shape[:3]))


@pytest.mark.parametrize("boundary", [-1, 0])
@pytest.mark.parametrize("num_gt", [(3, 2), (3, 0)])
@every_family
def test_assignment_is_detectron2s_before_it_samples(family, num_gt, boundary, monkeypatch):
    seen = _seen(family, num_gt)
    rpn = seen.model.proposal_generator
    monkeypatch.setattr(rpn, "anchor_boundary_thresh", boundary)
    monkeypatch.setattr(rpn, "_subsample_labels", lambda labels: labels)
    targets = seen.values.gt_instances
    labels, boxes = rpn.label_and_sample_anchors(seen["anchors"], targets)
    seen.values._values.pop("assign", None)
    found = seen["assign"]
    assert found.num_classes == 1
    assert found.labels.shape == (2, sum(len(x) for x in seen["anchors"]))
    for ours, our_boxes, theirs, their_boxes in zip(found.labels, found.boxes, labels, boxes):
        # Detectron2: 1 foreground, 0 background; here the only class is 0 and background 1
        assert torch.equal(ours, torch.tensor([1, 0, -1])[theirs.long()])
        assert torch.equal(our_boxes[ours == 0], their_boxes[ours == 0])
    assert torch.equal(found.positive, torch.stack(labels) == 1)
    assert torch.equal(found.valid, torch.stack(labels) >= 0)
    assert found.positive[0].any() and (found.labels == 1).any()
    assert found.positive[1].any() == bool(num_gt[1])
    assert not found.labels.requires_grad


@every_family
def test_trunk_and_rpn_equal_a_naive_run(family):
    seen = _seen(family)
    model = seen.model
    with torch.no_grad():
        images = model.preprocess_image(_batch())
        features = model.backbone(images.tensor)
        names = model.proposal_generator.in_features
        logits, deltas = model.proposal_generator.rpn_head([features[name] for name in names])
        bottom_up = getattr(model.backbone, "bottom_up", model.backbone)(images.tensor)
    assert all(torch.equal(seen[f"backbone.{name}"], x) for name, x in bottom_up.items())
    assert all(torch.equal(seen[f"neck.{name}"], x) for name, x in features.items())
    for key, expected in (
        ("neck", [features[name] for name in names if name != "p6"]),
        ("rpn.obj", logits),
        ("rpn.box", deltas),
    ):
        assert len(seen[key]) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(seen[key], expected)), key


def _check_proposals(ours, labelled, targets):
    positives = 0
    assert len(ours) == len(labelled) == 2
    for mine, theirs, target in zip(ours, labelled, targets):
        assert torch.equal(mine.proposal_boxes.tensor, theirs.proposal_boxes.tensor)
        assert torch.equal(mine.gt_classes, theirs.gt_classes)
        assert mine.image_size == target.image_size
        positive = (mine.gt_classes >= 0) & (mine.gt_classes < K)
        if len(target):
            assert torch.equal(mine.gt_boxes.tensor[positive], theirs.gt_boxes.tensor[positive])
        else:
            assert not positive.any() and (mine.gt_boxes.tensor == 0).all()
        assert len(mine.gt_boxes) == len(mine)
        positives += positive.sum().item()
    return positives


@pytest.mark.parametrize("family, stage", [(f, s) for f in FAMILIES for s in range(NUM_STAGES[f])])
@pytest.mark.parametrize("num_gt", [(3, 2), (3, 0), (0, 0)])
def test_proposals_are_those_the_student_sampled_with_its_own_labels(family, stage, num_gt):
    seen = _seen(family, num_gt)
    proposals = seen[f"proposals[{stage}]"]
    targets = seen.values.gt_instances
    positives = _check_proposals(proposals, seen.labelled[stage], targets)
    # otherwise the comparison of classes would say little
    assert positives >= 2 if sum(num_gt) else positives == 0
    rows = sum(len(p) for p in proposals)
    if stage == 0:
        assert rows == 2 * 24  # MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        assert all(
            torch.equal(a.gt_classes, b.gt_classes) for a, b in zip(seen["proposals"], proposals)
        )
    assert len(seen[f"roi.cls[{stage}]"]) == rows


@pytest.mark.parametrize("stage", [1, 2])
def test_each_cascade_stage_labels_with_its_own_threshold(stage):
    seen = _seen("Cascade")
    found = seen[f"proposals[{stage}]"]
    boxes, sizes = [p.proposal_boxes for p in found], [p.image_size for p in found]
    targets = seen.values.gt_instances
    counts = []
    for matcher in seen.model.roi_heads.proposal_matchers:
        labelled = label_boxes(boxes, targets, matcher, K, sizes)
        counts.append(sum((p.gt_classes < K).sum().item() for p in labelled))
    own = sum((p.gt_classes < K).sum().item() for p in found)
    assert own == counts[stage] and counts.count(own) == 1


def test_reading_proposals_leaves_the_models_own_objects_alone():
    seen = _Seen("GeneralizedRCNN", (3, 0))
    sampled = seen.values.single("roi_heads").output[0]
    assert seen["proposals"][1].has("gt_boxes") and not sampled[1].has("gt_boxes")
    assert seen["proposals"][0].gt_boxes is sampled[0].gt_boxes


@pytest.mark.parametrize("family, stage", [(f, s) for f in FAMILIES for s in range(NUM_STAGES[f])])
def test_roi_values_equal_the_predictors_and_a_recomputation_from_the_boxes(family, stage):
    seen = _seen(family)
    heads = seen.model.roi_heads
    boxes = [p.proposal_boxes for p in seen[f"proposals[{stage}]"]]
    features = (
        [seen[f"neck.{name}"] for name in heads.in_features]
        if family == "C4"
        else [seen[f"neck.{name}"] for name in heads.box_in_features]
    )
    rows, width = sum(len(b) for b in boxes), {"C4": (256, 6, 512)}.get(family, (32, 5, 48))
    with torch.no_grad():
        if family == "C4":
            pooled = heads.pooler(features, boxes)
            embed = heads.res5(pooled).mean(dim=(2, 3))
            predictor = heads.box_predictor
        else:
            pooled = heads.box_pooler(features, boxes)
            head = heads.box_head[stage] if family == "Cascade" else heads.box_head
            embed = head(pooled)
            cascade = family == "Cascade"
            predictor = heads.box_predictor[stage] if cascade else heads.box_predictor
        logits, deltas = predictor.cls_score(embed), predictor.bbox_pred(embed)
    expected = {"feat": pooled, "embed": embed, "cls": logits, "box": deltas}
    for name, value in expected.items():
        ours = seen[f"roi.{name}[{stage}]"]
        assert torch.equal(ours, value), name
        assert ours.requires_grad
        if stage == 0:
            assert torch.equal(seen[f"roi.{name}"], value)
    assert pooled.shape == (rows, width[0], width[1], width[1])
    assert embed.shape == (rows, width[2])
    assert logits.shape == (rows, K + 1)
    assert deltas.shape == (rows, 4 if family == "Cascade" else 4 * K)
    # what the model itself computed its losses from
    assert seen[f"roi.cls[{stage}]"] is seen.predicted[stage][0]
    assert seen[f"roi.box[{stage}]"] is seen.predicted[stage][1]


@pytest.mark.parametrize("family, stage", [(f, s) for f in FAMILIES for s in range(NUM_STAGES[f])])
def test_the_codec_turns_proposals_into_the_predicted_boxes(family, stage):
    seen = _seen(family)
    predictor = seen.model.roi_heads.box_predictor
    predictor = predictor[stage] if family == "Cascade" else predictor
    proposals = seen[f"proposals[{stage}]"]
    expected = predictor.predict_boxes(seen.predicted[stage], proposals)
    codec, deltas = seen[f"roi.codec[{stage}]"], seen[f"roi.box[{stage}]"]
    found = codec.apply_deltas(deltas, torch.cat([p.proposal_boxes.tensor for p in proposals]))
    assert torch.equal(found, torch.cat(list(expected))) and found.requires_grad
    # a teacher has it, too, and no pass is needed to read it
    boxes = [p.proposal_boxes for p in proposals]
    images = seen.model.preprocess_image(_batch()).tensor
    run = seen.tap.run(seen.model, images, [f"roi.codec[{stage}]"])
    assert run[f"roi.codec[{stage}]"] is codec
    values = run.run_rois([f"roi.codec[{stage}]"], boxes)
    assert list(values.values()) == [codec]


def test_classification_loss_can_be_recomputed_from_the_keys():
    seen = _seen("GeneralizedRCNN")
    classes = cat([p.gt_classes for p in seen["proposals"]])
    loss = torch.nn.functional.cross_entropy(seen["roi.cls"], classes)
    torch.testing.assert_close(loss, seen.losses["loss_cls"])


def _naive_labels(boxes, gt, low, high):
    """Class per box: of the best GT if its IoU is at least high, else K; -1 in between."""
    labels = []
    for x1, y1, x2, y2 in boxes.tolist():
        best, label = 0.0, K
        for (a1, b1, a2, b2), c in zip(gt.gt_boxes.tensor.tolist(), gt.gt_classes.tolist()):
            inter = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
            iou = inter / ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - inter)
            if iou > best:
                best, label = iou, c
        labels.append(label if best >= high else K if best < low else -1)
    return labels


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (0.3, 0.6)])
def test_label_boxes_equals_a_naive_matching(low, high):
    ignored = low != high
    thresholds, values = ([low, high], [0, -1, 1]) if ignored else ([high], [0, 1])
    gt = _batch((4, 4))
    generator = torch.Generator().manual_seed(0)
    boxes = []
    for x in gt:
        jitter = torch.randn(10, 4, 4, generator=generator) * torch.arange(10).view(-1, 1, 1)
        noisy = (x["instances"].gt_boxes.tensor[None] + jitter).reshape(-1, 4)
        boxes.append(Boxes(torch.cat([noisy[:, :2], noisy[:, 2:].maximum(noisy[:, :2] + 1)], 1)))
    targets = [x["instances"] for x in gt]
    sizes = [t.image_size for t in targets]
    labelled = label_boxes(boxes, targets, Matcher(thresholds, values), K, sizes)
    seen = set()
    for result, b, target in zip(labelled, boxes, targets):
        expected = _naive_labels(b.tensor, target, low, high)
        assert result.gt_classes.tolist() == expected
        seen |= set(expected)
        assert result.proposal_boxes is b
    assert K in seen and len(seen - {K, -1}) >= 2 and (-1 in seen) == ignored


def test_label_boxes_leaves_the_ground_truth_alone():
    targets = [x["instances"] for x in _batch((2, 0))]
    classes = targets[0].gt_classes.clone()
    matcher = tiny_model("GeneralizedRCNN").roi_heads.proposal_matcher
    boxes = [Boxes(torch.tensor([[0.0, 0, 1, 1], [0, 0, 2, 2]])), Boxes(torch.zeros(0, 4))]
    labelled = label_boxes(boxes, targets, matcher, K, [t.image_size for t in targets])
    assert labelled[0].gt_classes.tolist() == [K, K] and len(labelled[1]) == 0
    assert torch.equal(targets[0].gt_classes, classes)


def _frozen(family):
    return tiny_model(family).eval().requires_grad_(False)


def _run(model, batch=None, keys=None):
    tap = build_tap(model)
    images = model.preprocess_image(batch or _batch()).tensor
    return tap.run(model, images, keys or list(tap.keys(model)))


@every_family
def test_staged_run_equals_the_eval_models_own_raw_outputs(family):
    model = _frozen(family)
    heads = model.roi_heads
    own = {"boxes": [], "pooled": [], "predictions": [], "rpn": []}
    pooler = heads.pooler if family == "C4" else heads.box_pooler
    predictors = heads.box_predictor if family == "Cascade" else [heads.box_predictor]

    def keep_pooled(_, inputs, output):
        own["boxes"].append([b.clone() for b in inputs[1]])
        own["pooled"].append(output.clone())

    handles = [pooler.register_forward_hook(keep_pooled)]
    for predictor in predictors:
        handles.append(
            predictor.register_forward_hook(
                lambda _, inputs, output: own["predictions"].append(
                    (inputs[0].clone(), *(x.clone() for x in output))
                )
            )
        )
    handles.append(
        model.proposal_generator.rpn_head.register_forward_hook(
            lambda _, __, output: own["rpn"].extend([x.clone() for x in part] for part in output)
        )
    )
    model(_batch())
    for handle in handles:
        handle.remove()
    run = _run(model)
    for key, levels in zip(("rpn.obj", "rpn.box"), own["rpn"]):
        assert all(torch.equal(a, b) for a, b in zip(run[key], levels)), key
    assert len(own["boxes"]) == NUM_STAGES[family]
    for stage, boxes in enumerate(own["boxes"]):
        names = [f"roi.{name}[{stage}]" for name in ("feat", "embed", "cls", "box")]
        values = run.run_rois(names, boxes)
        expected = (own["pooled"][stage], *own["predictions"][stage])
        assert list(values) == names
        for name, value in zip(names, expected):
            assert torch.equal(values[name], value), name
            assert len(value) == sum(len(b) for b in boxes) > 0


@every_family
def test_given_boxes_without_index_mean_the_first_stage(family):
    model = _frozen(family)
    boxes = [x["instances"].gt_boxes for x in _batch()]
    values = _run(model).run_rois(["roi.cls", "roi.cls[0]", "roi.embed"], boxes)
    assert torch.equal(values["roi.cls"], values["roi.cls[0]"])
    assert len(values["roi.embed"]) == 5


@every_family
@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1)])
def test_images_without_boxes_contribute_no_rows(family, empty):
    model = _frozen(family)
    boxes = [x["instances"].gt_boxes for x in _batch()]
    none = Boxes(torch.zeros(0, 4))
    given = [none if i in empty else b for i, b in enumerate(boxes)]
    keys = [f"roi.{name}" for name in ("feat", "embed", "cls", "box")]
    full, partial = _run(model).run_rois(keys, boxes), _run(model).run_rois(keys, given)
    kept = torch.cat([torch.full((len(b),), i not in empty) for i, b in enumerate(boxes)])
    for key in keys:
        assert partial[key].shape == (int(kept.sum()), *full[key].shape[1:]), key
        torch.testing.assert_close(partial[key], full[key][kept])


def test_rows_follow_the_order_of_images_and_boxes():
    model = _frozen("GeneralizedRCNN")
    boxes = [x["instances"].gt_boxes for x in _batch()]
    run = _run(model)
    together = run.run_rois(["roi.cls"], boxes)["roi.cls"]
    row = 0
    for image, image_boxes in enumerate(boxes):
        for i in range(len(image_boxes)):
            one = [Boxes(torch.zeros(0, 4)), Boxes(torch.zeros(0, 4))]
            one[image] = image_boxes[i : i + 1]
            alone = run.run_rois(["roi.cls"], one)["roi.cls"]
            torch.testing.assert_close(together[row : row + 1], alone)
            row += 1
    assert row == len(together) == 5


def test_sampled_proposals_of_a_teacher_do_not_exist():
    run = _run(_frozen("GeneralizedRCNN"))
    for key in ("proposals", "roi.cls"):
        with pytest.raises(ValueError, match=r"runs on given boxes only.*teacher\.run"):
            run[key]
    assert run["rpn.obj"][0].shape[1] == 3  # the rest still works


def test_unknown_roi_heads_list_the_known_ones():
    model = tiny_model("GeneralizedRCNN")

    class Strange(torch.nn.Module):
        pass

    model.roi_heads = Strange()
    with pytest.raises(ValueError, match="Strange.*CascadeROIHeads, Res5ROIHeads, StandardROIHea"):
        build_tap(model).keys(model)
