"""Gradient maps against gradients taken by other means."""

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from kd_d2.distillation import DistillationContext, StudentView, build_distillers, build_tap
from kd_d2.projects.crosskd.analysis.gradient_maps import (
    box_coverage,
    gradient_maps,
    gradient_observer,
    min_max,
    share_inside,
    to_image,
)
from tests.fixtures import tiny_batch
from tests.projects.crosskd.cases import crosskd_cfg, detector, pair


def observer_of(name, student=None, **arguments):
    student = detector(name) if student is None else student
    return gradient_observer(crosskd_cfg(name), student, pair(name)[1], **arguments)


def losses_by_hand(name, student, teacher, batch, labels):
    """Total of each method from the tap's own observation, without a KDModel."""
    cfg = crosskd_cfg(name, ("CrossKD", "PKD"))
    cfg.KD.PKD.LOCATIONS, cfg.KD.PKD.STAGE = ("cls", "reg"), 1
    keys = build_tap(student).keys(student)
    distillers, _ = build_distillers(cfg, keys, teacher.keys)
    needs = {"path:backbone", "head.cls[1]", "head.box[1]"}
    teacher_needs = set()
    for distiller in distillers.values():
        needs |= distiller.student_needs
        teacher_needs |= distiller.teacher_needs
    student.eval()
    student.training = True
    with EventStorage(0), build_tap(student).observe(student, needs) as seen:
        student(batch)
    instances = [x["instances"] for x in batch]
    seen.gt_instances = instances
    size = tuple(seen.single("backbone").inputs[0].shape[-2:])
    context = DistillationContext(
        batched_inputs=batch,
        gt_instances=instances,
        padded_size=size,
        student=StudentView(seen),
        teacher=teacher.start(batch, size, teacher_needs, instances),
        iteration=0,
    )
    totals = {label: sum(distillers[label](context).values()) for label in labels}
    return totals, {"cls": seen["head.cls[1]"], "reg": seen["head.box[1]"]}


@pytest.mark.parametrize("name", ["GFL", "RetinaNet", "FCOS", "ATSS"])
def test_maps_are_autograd_by_hand(name):
    batch = tiny_batch(1)
    observer, taps, labels = observer_of(name, detector(name), before_activation=False)
    assert taps == {"cls": "head.cls[1]", "reg": "head.box[1]"} and labels == ["crosskd", "pkd"]
    seen = observer(batch)
    totals, features = losses_by_hand(name, detector(name), pair(name)[1], batch, labels)
    for label in labels:
        for tower, key in taps.items():
            found = gradient_maps(seen, label, key)
            for level, feature in enumerate(features[tower]):
                (gradient,) = torch.autograd.grad(
                    totals[label], feature, retain_graph=True, allow_unused=True
                )
                expected = gradient[0].abs().sum(dim=0) / feature.shape[1]
                torch.testing.assert_close(found[level][0], expected, rtol=1e-4, atol=1e-9)
        assert found[0].sum() > 0


def test_before_the_relu_only_active_cells_count():
    batch = tiny_batch(1)
    observer, taps, _ = observer_of("GFL", detector("GFL"))
    assert taps == {"cls": "head.cls[1]:pre", "reg": "head.box[1]:pre"}
    seen = observer(batch)
    after, _, _ = observer_of("GFL", detector("GFL"), before_activation=False)
    behind = after(batch)
    for level, found in enumerate(gradient_maps(seen, "pkd", taps["cls"])):
        feature = behind.student["head.cls[1]"][level]
        loss = sum(v for k, v in behind.losses.items() if k.startswith("loss_kd/pkd/"))
        (gradient,) = torch.autograd.grad(loss, feature, retain_graph=True)
        expected = (gradient * (feature > 0)).abs().mean(dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_position_zero_is_the_pyramid_and_both_towers_reach_it():
    observer, taps, _ = observer_of("ATSS", position=0)
    assert taps == {"pyramid": "head.cls[0]"}
    seen = observer(tiny_batch(1))
    assert all(m.sum() > 0 for m in gradient_maps(seen, "crosskd", "head.cls[0]")[:3])
    assert gradient_maps(seen, "pkd", "head.cls[0]")[0].sum() > 0


def test_a_loss_that_does_not_reach_the_feature_gives_zeros():
    """PKD on the classification tower has no gradient in the box tower."""
    student, teacher = detector("GFL"), pair("GFL")[1]
    cfg = crosskd_cfg("GFL", BRANCHES=("cls",))
    observer, taps, _ = gradient_observer(cfg, student, teacher)
    assert list(taps) == ["cls"]
    seen = observer(tiny_batch(1))
    other = list(seen.student["head.cls[1]:pre"])
    seen.student["elsewhere"] = [torch.zeros_like(x, requires_grad=True) for x in other]
    maps = gradient_maps(seen, "pkd", "elsewhere")
    assert [m.shape for m in maps] == [x[:, 0].shape for x in other]
    assert all(m.abs().sum() == 0 for m in maps)


def test_batch_norm_uses_its_running_statistics():
    """The map of an image does not depend on what else was looked at before."""
    batches = tiny_batch(2, sizes=[(128, 128)])
    student, teacher = detector("GFL"), pair("GFL")[1]
    observer, taps, _ = gradient_observer(crosskd_cfg("GFL"), student, teacher)
    before = {k: v.clone() for k, v in student.state_dict().items()}
    first = gradient_maps(observer(batches[:1]), "crosskd", taps["cls"])
    observer(batches[1:])
    again = gradient_maps(observer(batches[:1]), "crosskd", taps["cls"])
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_positions_without_a_feature_are_refused():
    with pytest.raises(ValueError, match="POSITION 3 is prediction mimicking.*0..2"):
        observer_of("GFL", position=3)
    with pytest.raises(ValueError, match="0..3.*got 4"):
        observer_of("GFL", position=4)
    student, teacher = detector("GFL"), pair("GFL")[1]
    cfg = crosskd_cfg("GFL", POSITION_CLS=1, POSITION_REG=2)
    with pytest.raises(ValueError, match="'cls': 1, 'reg': 2.*--position"):
        gradient_observer(cfg, student, teacher)
    with pytest.raises(ValueError, match="pre_act.*--after-relu"):
        gradient_observer(
            crosskd_cfg("GFL", TAP="pre_act"), student, teacher, before_activation=False
        )


class TestShares:
    VALUES = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    def test_fraction_by_hand(self):
        # cells of 4 pixels; the box covers the right half of cell (0, 0), all of (0, 1)
        coverage = box_coverage(torch.tensor([[2.0, 0.0, 8.0, 4.0]]), (2, 2), 4)
        assert coverage.tolist() == [[0.5, 1.0], [0.0, 0.0]]
        assert share_inside(self.VALUES, coverage) == pytest.approx(2.5 / 10)

    def test_overlapping_boxes_count_once(self):
        boxes = torch.tensor([[0.0, 0.0, 4.0, 8.0], [0.0, 0.0, 4.0, 4.0]])
        coverage = box_coverage(boxes, (2, 2), 4)
        assert share_inside(self.VALUES, coverage) == pytest.approx(4 / 10)

    def test_reference_points_on_the_corners(self):
        # offset 0: cell (1, 1) is the square from 2 to 6 around (4, 4)
        coverage = box_coverage(torch.tensor([[2.0, 2.0, 6.0, 6.0]]), (2, 2), 4, offset=0.0)
        assert coverage.tolist() == [[0.0, 0.0], [0.0, 1.0]]

    def test_nothing_to_share(self):
        coverage = box_coverage(torch.zeros(0, 4), (2, 2), 4)
        assert share_inside(self.VALUES, coverage) == 0.0
        assert np.isnan(share_inside(torch.zeros(2, 2), coverage))

    @pytest.mark.parametrize("offset", [0.0, 0.5])
    def test_coverage_is_a_count_of_pixels(self, offset):
        boxes = torch.tensor([[3.2, 5.0, 17.7, 21.0], [10.0, 2.0, 30.0, 9.0]])
        stride, corner = 8, round((offset - 0.5) * 8)
        expected = torch.zeros(4, 4)
        for row in range(4):
            for column in range(4):
                for i in range(stride):
                    for j in range(stride):
                        y = corner + row * stride + i + 0.5
                        x = corner + column * stride + j + 0.5
                        hit = any(
                            x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes.tolist()
                        )
                        expected[row, column] += hit / stride**2
        torch.testing.assert_close(box_coverage(boxes, (4, 4), stride, offset), expected)


class TestPictures:
    def test_enlarged_and_cropped(self):
        values = torch.rand(3, 4)
        expected = F.interpolate(values[None, None], scale_factor=8, mode="bilinear")[0, 0]
        assert torch.equal(to_image(values, 8, (20, 30)), expected[:20, :30])

    def test_cells_lie_around_their_reference_points(self):
        values = torch.arange(12.0).reshape(3, 4)
        centred = to_image(values, 8, (24, 32), offset=0.0, mode="nearest")
        for row in range(3):
            for column in range(4):
                y, x = 8 * row, 8 * column
                block = centred[max(y - 4, 0) : y + 4, max(x - 4, 0) : x + 4]
                assert (block == values[row, column]).all()
        assert centred.shape == (24, 32)

    def test_range(self):
        maps = [np.array([[1.0, 3.0]]), np.array([[0.0, 5.0]]), np.full((1, 2), 2.0)]
        own = min_max(maps)
        assert [m.tolist() for m in own] == [[[0.0, 1.0]], [[0.0, 1.0]], [[0.0, 0.0]]]
        shared = min_max(maps, shared=True)
        assert [m.tolist() for m in shared] == [[[0.2, 0.6]], [[0.0, 1.0]], [[0.4, 0.4]]]
