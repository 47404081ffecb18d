"""Expansion and crop of SSD against loops, and their statistics."""

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.utils.env import seed_all_rng

from kd_d2.data import Expand, MinIoUCrop
from kd_d2.data.ssd_augmentation import ExpandTransform, centres_inside, patch_ious

FILL = (123.675, 116.28, 103.53)


def test_expansion_by_hand():
    image = np.arange(2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3)
    transform = ExpandTransform(left=2, top=1, width=7, height=5, fill=FILL)
    canvas = transform.apply_image(image)
    assert canvas.shape == (5, 7, 3) and canvas.dtype == np.float32
    for y in range(5):
        for x in range(7):
            inside = 1 <= y < 3 and 2 <= x < 5
            expected = image[y - 1, x - 2] if inside else np.float32(FILL)
            assert canvas[y, x].tolist() == expected.tolist()
    boxes = transform.apply_box(np.array([[0.5, 0, 3, 2]]))
    assert boxes.tolist() == [[2.5, 1, 5, 3]]


def test_distribution_of_expansions():
    seed_all_rng(0)
    augmentation, image = Expand(FILL), np.zeros((100, 200, 3), np.float32)
    draws = [augmentation.get_transform(image) for _ in range(4000)]
    expanded = [t for t in draws if isinstance(t, ExpandTransform)]
    assert abs(len(expanded) / 4000 - 0.5) < 0.03
    ratios = np.array([t.width / 200 for t in expanded])
    assert 1 <= ratios.min() < 1.05 and 3.95 < ratios.max() <= 4 and abs(ratios.mean() - 2.5) < 0.05
    for t in expanded:
        assert isinstance(t.left, int) and 0 <= t.left <= t.width - 200
        assert isinstance(t.top, int) and 0 <= t.top <= t.height - 100
        assert abs(t.width - 2 * t.height) <= 2  # the same ratio for both sides
        assert t.fill == FILL
    room = [t for t in expanded if t.width > 300]
    place = np.array([t.left / (t.width - 200) for t in room])
    assert abs(place.mean() - 0.5) < 0.03 and place.min() < 0.02 and place.max() > 0.98
    vertical = np.array([t.top / (t.height - 100) for t in room])
    assert abs(np.corrcoef(place, vertical)[0, 1]) < 0.08  # drawn independently


@pytest.mark.parametrize("prob, ratio", [(1.5, 2.0), (0.5, 0.9)])
def test_expansion_out_of_range(prob, ratio):
    with pytest.raises(ValueError, match="EXPAND_RATIO must be at least 1 and EXPAND_PROB"):
        Expand(FILL, ratio, prob)


def _naive_iou(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(w, 0) * max(h, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def test_ious_of_a_patch_equal_a_loop():
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 80, (40, 2))
    boxes = np.concatenate((corners, corners + generator.uniform(1, 60, (40, 2))), axis=1)
    patch = (20, 10, 90, 70)
    expected = [_naive_iou(patch, box) for box in boxes]
    np.testing.assert_allclose(patch_ious(patch, boxes), expected)
    assert min(expected) == 0 < max(expected)


def test_centre_on_the_border_is_outside():
    boxes = np.array(
        [[0.0, 0, 4, 4], [-2, 1, 2, 3], [18, 1, 22, 3], [5, 8, 7, 12], [5, 7.9, 7, 12]]
    )
    assert centres_inside(boxes, (10, 20)).tolist() == [True, False, False, False, True]
    assert centres_inside(np.zeros((0, 4)), (10, 20)).tolist() == []


@pytest.fixture
def scene():
    image = np.zeros((120, 200, 3), np.float32)
    boxes = np.array([[20.0, 30, 120, 100], [90, 50, 170, 110], [60, 40, 130, 90]])
    return image, boxes


def test_every_patch_satisfies_its_mode(scene, monkeypatch):
    """Each mode alone: the rule, for every box, in loops; and the ranges of the patches."""
    image, boxes = scene
    seed_all_rng(0)
    for mode, least in enumerate((None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)):
        modes = iter([mode] + [0] * 1000)  # the whole image if 50 tries fail
        monkeypatch.setattr(np.random, "randint", lambda n: n == 7 and next(modes))
        found = [MinIoUCrop().get_transform(image, boxes)]
        for _ in range(150):
            modes = iter([mode] + [0] * 1000)
            found.append(MinIoUCrop().get_transform(image, boxes))
        crops = [t for t in found if isinstance(t, T.CropTransform)]
        if least is None or least > 0.7:
            # the three boxes differ too much for one patch to overlap each by 0.9
            assert not crops and all(isinstance(t, T.NoOpTransform) for t in found)
            continue
        assert len(crops) > (100 if least < 0.3 else 0) or least >= 0.5, least
        for t in crops:
            assert all(isinstance(v, int) for v in (t.x0, t.y0, t.w, t.h))
            patch = (t.x0, t.y0, t.x0 + t.w, t.y0 + t.h)
            assert 0 <= patch[0] < patch[2] <= 200 and 0 <= patch[1] < patch[3] <= 120
            assert t.w >= 0.3 * 200 - 1 and t.h >= 0.3 * 120 - 1
            assert 0.45 < t.h / t.w < 2.1  # [1/2, 2] before rounding to whole pixels
            assert min(_naive_iou(patch, box) for box in boxes) >= least
            centres = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes]
            assert any(patch[0] < x < patch[2] and patch[1] < y < patch[3] for x, y in centres)


def test_modes_are_equally_likely(monkeypatch):
    """One box that fills the image: 0.3 of each side already fits 0.1, no patch fits 0.9 ..."""
    seen = []
    original = np.random.randint
    monkeypatch.setattr(np.random, "randint", lambda n: seen.append(original(n)) or seen[-1])
    seed_all_rng(1)
    image, boxes = np.zeros((100, 100, 3), np.float32), np.array([[0.0, 0, 100, 100]])
    kept = 0
    for _ in range(2100):
        kept += isinstance(MinIoUCrop().get_transform(image, boxes), T.NoOpTransform)
    counts = np.bincount(seen, minlength=7)
    assert len(counts) == 7 and abs(counts / counts.sum() - 1 / 7).max() < 0.03
    assert counts.sum() >= 2100 and kept >= counts[0]


def test_crop_without_boxes_takes_any_patch():
    seed_all_rng(0)
    image = np.zeros((100, 100, 3), np.float32)
    draws = [MinIoUCrop().get_transform(image, np.zeros((0, 4))) for _ in range(700)]
    crops = [t for t in draws if isinstance(t, T.CropTransform)]
    assert abs(len(crops) / 700 - 6 / 7) < 0.05
    widths = np.array([t.w for t in crops])
    assert 29 <= widths.min() < 35 and 95 < widths.max() <= 100


def test_a_box_that_no_patch_can_hold_ends_with_the_whole_image():
    """Its centre is outside: no crop is ever accepted, and the loop ends all the same."""
    seed_all_rng(0)
    image, boxes = np.zeros((50, 50, 3), np.float32), np.array([[-30.0, -30, 2, 2]])
    for _ in range(5):
        assert isinstance(MinIoUCrop(tries=5).get_transform(image, boxes), T.NoOpTransform)


def test_augmentations_read_boxes_of_the_input(scene):
    image, boxes = scene
    seed_all_rng(3)
    inputs = T.AugInput(image, boxes=boxes.copy())
    transforms = T.AugmentationList([Expand(FILL, prob=1.0), MinIoUCrop()])(inputs)
    np.testing.assert_allclose(inputs.boxes, transforms.apply_box(boxes))
    assert inputs.image.shape == transforms.apply_image(image).shape
    assert "max_ratio" not in repr(Expand(FILL)) and "Expand" in repr(Expand(FILL))
