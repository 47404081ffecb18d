"""L1 distances and target conflicts against loops over positions."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from torchvision.ops import box_iou

from kd_d2.distillation import Assignment
from kd_d2.projects.crosskd.analysis.conflict_maps import conflict_maps, count_conflicts
from kd_d2.projects.crosskd.analysis.dense import DenseBatch
from kd_d2.projects.crosskd.analysis.l1_curves import L1Distances, find_checkpoints, l1_sums
from kd_d2.projects.crosskd.analysis.observer import PREDICTIONS, Observation, Observer
from tests.fixtures import tiny_batch
from tests.projects.crosskd.cases import DETECTORS, detector, pair


def observed(name, batch):
    return Observer(detector(name), pair(name)[1], *PREDICTIONS)(batch)


def positions_of(seen):
    """Everything about every position, one dict each, in the order of the anchors."""
    student, teacher, model = seen.student, seen.teacher, seen.model
    num_classes, codec = model.num_classes, student["codec"]
    dim = getattr(codec, "box_dim", 4)
    labels = student["assign"].labels
    for image, (height, width) in enumerate(seen.image_sizes):
        index = 0
        for level, anchors in enumerate(student["anchors"]):
            stride = model.anchor_generator.strides[level]
            rows, columns = student["pred.cls"][level].shape[-2:]
            num_anchors = student["pred.cls"][level].shape[1] // num_classes
            divisor = max(model.backbone.size_divisibility, 1)
            own = [-(-side // divisor) * divisor for side in (height, width)]
            for cell in range(rows * columns):
                row, column = divmod(cell, columns)
                inside = row * stride < own[0] and column * stride < own[1]
                for a in range(num_anchors):
                    anchor = anchors.tensor[cell * num_anchors + a]
                    yield {
                        "where": (image, level, a, row, column),
                        "label": int(labels[image, index]),
                        "counted": inside and int(labels[image, index]) >= 0,
                        "gt": student["assign"].boxes[image, index],
                        "anchor": anchor,
                        "stride": stride,
                        **{
                            f"{side}_{kind}": values[kind](
                                source[f"pred.{kind}"][level][image, :, row, column], a, anchor
                            )
                            for side, source in (("s", student), ("t", teacher))
                            for values in [
                                {
                                    "cls": lambda x, a, _: x.detach()
                                    .reshape(num_anchors, num_classes)[a]
                                    .sigmoid(),
                                    "box": lambda x, a, anchor: codec.apply_deltas(
                                        x.detach().reshape(num_anchors, dim)[a][None],
                                        anchor[None],
                                    )[0],
                                }
                            ]
                            for kind in ("cls", "box")
                        },
                    }
                    index += 1


def ltrb(box, position):
    x0, y0, x1, y1 = position["anchor"].tolist()
    x, y, stride = (x0 + x1) / 2, (y0 + y1) / 2, position["stride"]
    a, b, c, d = box.tolist()
    return torch.tensor([x - a, y - b, c - x, d - y]) / stride


def wanted(name, position):
    if name != "GFL":
        return 1.0
    return float(box_iou(position["s_box"][None], position["gt"][None]))


@pytest.mark.parametrize("name", list(DETECTORS))
def test_measures_are_those_of_a_loop(name):
    seen = observed(name, tiny_batch(2))
    values = {"cls_teacher": [], "cls_gt": [], "reg_teacher": [], "reg_gt": []}
    for position in positions_of(seen):
        label = position["label"]
        if not position["counted"]:
            continue
        values["cls_teacher"] += (position["s_cls"] - position["t_cls"]).abs().tolist()
        if label == seen.model.num_classes:
            continue
        values["cls_gt"].append(abs(float(position["s_cls"][label]) - wanted(name, position)))
        own = ltrb(position["s_box"], position)
        values["reg_teacher"] += (own - ltrb(position["t_box"], position)).abs().tolist()
        values["reg_gt"] += (own - ltrb(position["gt"], position)).abs().tolist()
    assert values["cls_gt"]
    found = l1_sums(DenseBatch(seen))
    for key, numbers in values.items():
        assert found[key][1] == len(numbers), key
        assert found[key][0] == pytest.approx(sum(numbers), rel=1e-4), key


def hand_made(student_logits, teacher_logits, student_deltas, teacher_deltas, labels):
    """One image of 8x4 pixels, one level of stride 4, two cells, one anchor, two classes."""

    def level(rows):
        return [torch.tensor(rows).T.reshape(1, -1, 1, len(rows))]

    model = SimpleNamespace(
        num_classes=2,
        anchor_generator=SimpleNamespace(strides=[4], offset=0.5),
        backbone=SimpleNamespace(size_divisibility=0),
    )
    anchors = [Boxes(torch.tensor([[0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 8.0, 4.0]]))]
    gt = torch.tensor([[[0.0, 0.0, 4.0, 8.0]] * 2])
    codec = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))
    student = {
        "pred.cls": level(student_logits),
        "pred.box": level(student_deltas),
        "anchors": anchors,
        "codec": codec,
        "assign": Assignment(torch.tensor([labels]), gt, 2),
    }
    teacher = {"pred.cls": level(teacher_logits), "pred.box": level(teacher_deltas)}
    return Observation(model, student, teacher, [(4, 8)], {})


LN3 = 1.0986123  # sigma = 0.75
EXAMPLE = (
    [[LN3, 0.0], [0.0, 0.0]],
    [[0.0, -LN3], [0.0, LN3]],
    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
    [[0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
)


class TestByHand:
    """First cell: class 0, its box 0, 0, 4, 8; second: background."""

    @pytest.fixture(autouse=True)
    def known_family(self, monkeypatch):
        # the stand-in for a model is of no family; its class target is 1
        from kd_d2.projects.crosskd.analysis import dense

        registry = SimpleNamespace(find=lambda model: dense.one)
        monkeypatch.setattr(dense, "CLASS_TARGETS", registry)

    def test_distances(self):
        found = l1_sums(DenseBatch(hand_made(*EXAMPLE, [0, 2])))
        # |.75-.5|, |.5-.25|, 0, |.5-.75| over 2 cells x 2 classes
        assert found["cls_teacher"] == (pytest.approx(0.75, abs=1e-6), 4)
        # |.75 - 1|
        assert found["cls_gt"] == (pytest.approx(0.25, abs=1e-6), 1)
        # teacher's box is moved by half a width, 2 pixels, 0.5 strides: left and right side
        assert found["reg_teacher"] == (pytest.approx(1.0, abs=1e-6), 4)
        # the student's lower side is 4 pixels, 1 stride, short
        assert found["reg_gt"] == (pytest.approx(1.0, abs=1e-6), 4)

    def test_ignored_positions_do_not_count(self):
        found = l1_sums(DenseBatch(hand_made(*EXAMPLE, [-1, 2])))
        assert found["cls_teacher"] == (pytest.approx(0.25, abs=1e-6), 2)
        assert found["cls_gt"] == (0.0, 0) and found["reg_gt"] == (0.0, 0)

    def test_means_are_over_all_batches(self):
        total = L1Distances()
        total.add(DenseBatch(hand_made(*EXAMPLE, [0, 2])))
        total.add(DenseBatch(hand_made(*EXAMPLE, [-1, 2])))
        means = total.means()
        assert means["cls_teacher"] == pytest.approx((0.75 + 0.25) / 6, abs=1e-6)
        assert means["cls_gt"] == pytest.approx(0.25, abs=1e-6)
        empty = L1Distances().means()
        assert all(value != value for value in empty.values())

    def test_conflicts(self):
        (level,) = conflict_maps(DenseBatch(hand_made(*EXAMPLE, [0, 2])), 0.6)
        # cell 0: |1-.5|, |0-.25|; cell 1: |0-.5|, |0-.75|
        assert level.ground_truth.tolist() == [[[[1.0, 0.0]], [[0.0, 0.0]]]]
        assert level.conflict.tolist() == [[[False, True]]]
        torch.testing.assert_close(
            level.difference, torch.tensor([[[[0.5, 0.5]], [[0.25, 0.75]]]]), atol=1e-6, rtol=0
        )
        counts = {"positions": 2, "conflicts": 1, "positives": 1, "positive_conflicts": 0}
        assert count_conflicts([level]) == counts
        (level,) = conflict_maps(DenseBatch(hand_made(*EXAMPLE, [0, -1])), 0.4)
        assert level.conflict.tolist() == [[[True, False]]]
        assert level.difference[..., 1].abs().sum() == 0

    @pytest.mark.parametrize("threshold", [-0.1, 1.0])
    def test_thresholds_of_scores(self, threshold):
        with pytest.raises(ValueError, match=f"threshold.*{threshold}"):
            conflict_maps(DenseBatch(hand_made(*EXAMPLE, [0, 2])), threshold)

    def test_kinds_of_targets(self):
        with pytest.raises(ValueError, match="'detector' or 'one', got 'two'"):
            DenseBatch(hand_made(*EXAMPLE, [0, 2])).class_targets("two")


@pytest.mark.parametrize("name, target", [(n, "detector") for n in DETECTORS] + [("GFL", "one")])
def test_conflicts_are_those_of_a_loop(name, target):
    seen = observed(name, tiny_batch(1))
    differences = [x.difference.amax(dim=1) for x in conflict_maps(DenseBatch(seen), 0.0, target)]
    # half of the positions are in conflict
    threshold = float(torch.cat([x.flatten() for x in differences]).median()) + 1e-5
    levels = conflict_maps(DenseBatch(seen), threshold, target)
    totals = dict.fromkeys(("positions", "conflicts", "positives", "positive_conflicts"), 0)
    for position in positions_of(seen):
        _, level, a, row, column = position["where"]
        goal, label = torch.zeros(seen.model.num_classes), position["label"]
        positive = position["counted"] and label != seen.model.num_classes
        if positive:
            goal[label] = 1.0 if target == "one" else wanted(name, position)
        differs = any(abs(float(g) - float(t)) > threshold for g, t in zip(goal, position["t_cls"]))
        conflict = position["counted"] and differs
        assert bool(levels[level].conflict[a, row, column]) == conflict
        torch.testing.assert_close(
            levels[level].ground_truth[a, :, row, column], goal, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(levels[level].teacher[a, :, row, column], position["t_cls"])
        totals["positions"] += position["counted"]
        totals["conflicts"] += conflict
        totals["positives"] += positive
        totals["positive_conflicts"] += conflict and positive
    assert count_conflicts(levels) == totals
    assert 0 < totals["conflicts"] < totals["positions"] and totals["positives"]


def test_equal_networks_have_no_distance_to_each_other():
    student = detector("GFL", 1)
    seen = Observer(student, pair("GFL")[1], *PREDICTIONS)(tiny_batch(1))
    found = l1_sums(DenseBatch(seen))
    assert found["cls_teacher"][0] == pytest.approx(0, abs=1e-4)
    assert found["reg_teacher"][0] == pytest.approx(0, abs=1e-3)
    assert found["reg_gt"][0] > 1


def test_checkpoints_of_a_run(tmp_path):
    for name in ("model_0000199.pth", "model_0000099.pth", "model_final.pth", "model_best.pth"):
        (tmp_path / name).write_text("x")
    found = find_checkpoints(str(tmp_path))
    assert [iteration for iteration, _ in found] == [100, 200]
    assert found[0][1] == str(tmp_path / "model_0000099.pth")
    with pytest.raises(ValueError, match="model_<iteration>.pth.*CHECKPOINT_PERIOD"):
        find_checkpoints(str(tmp_path / "missing"))


def test_two_stage_detectors_are_refused():
    from tests.fixtures import teacher_of, tiny_model

    teacher = teacher_of(tiny_model("GeneralizedRCNN"))
    with pytest.raises(ValueError, match="of the student, which it does not have"):
        Observer(tiny_model("GeneralizedRCNN"), teacher, *PREDICTIONS)
