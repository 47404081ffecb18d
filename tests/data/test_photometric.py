"""SSD's photometric distortion, pixel by pixel and in distribution."""

import colorsys

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.utils.env import seed_all_rng

from kd_d2.data import PhotometricDistortion
from kd_d2.data.photometric import PhotometricTransform, shift_hue_and_saturation


def _pixels(seed=0, shape=(6, 7)):
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (*shape, 3)).astype(np.float32)
    image[0, 0], image[0, 1], image[0, 2] = 0, 255, [80, 80, 10]  # black, white, two equal channels
    image[1, 0], image[1, 1] = [10, 80, 80], [80, 10, 80]
    return image


@pytest.mark.parametrize("saturation, hue", [(1.0, 0.0), (0.5, 0.0), (0.7, 17.0), (1.0, -200.0)])
@pytest.mark.parametrize("channels", ["RGB", "BGR"])
def test_saturation_and_hue_equal_the_standard_library(saturation, hue, channels):
    image = _pixels()
    result = shift_hue_and_saturation(image, saturation, hue, channels)
    step = 1 if channels == "RGB" else -1
    for before, after in zip(image.reshape(-1, 3), result.reshape(-1, 3)):
        h, s, v = colorsys.rgb_to_hsv(*(before[::step] / 255))
        expected = colorsys.hsv_to_rgb((h + hue / 360) % 1, s * saturation, v)
        np.testing.assert_allclose(after[::step], np.array(expected) * 255, atol=2e-3)
    assert result.dtype == np.float32


def test_nothing_is_clipped():
    """Saturation above 1 goes below 0; values above 255 and below 0 keep their hue."""
    pure = np.array([[[200.0, 100.0, 50.0]]], np.float32)
    result = shift_hue_and_saturation(pure, 1.5, 0.0)
    np.testing.assert_allclose(result[0, 0], [200, 50, -25], atol=1e-3)
    outside = np.array([[[300.0, -20.0, 100.0], [-5.0, -30.0, -12.0]]], np.float32)
    np.testing.assert_allclose(shift_hue_and_saturation(outside, 1.0, 0.0), outside, atol=1e-4)
    np.testing.assert_allclose(shift_hue_and_saturation(outside, 1.0, 360.0), outside, atol=1e-3)


def test_order_of_the_steps():
    image = _pixels()
    arguments = {"brightness": 10.0, "contrast": 1.3, "saturation": 0.6, "hue": 12.0}
    first = PhotometricTransform(**arguments, contrast_first=True, order=(2, 0, 1))
    by_hand = shift_hue_and_saturation((image + 10) * 1.3, 0.6, 12.0)[..., [2, 0, 1]]
    np.testing.assert_allclose(first.apply_image(image), by_hand, atol=1e-3)
    last = PhotometricTransform(**arguments, contrast_first=False)
    by_hand = shift_hue_and_saturation(image + 10, 0.6, 12.0) * 1.3
    np.testing.assert_allclose(last.apply_image(image), by_hand, atol=1e-3)
    assert image[0, 1].tolist() == [255] * 3  # the input is not changed


def test_uint8_becomes_float_and_boxes_stay():
    transform = PhotometricTransform(brightness=30.0)
    image = np.full((2, 2, 3), 250, np.uint8)
    assert transform.apply_image(image).max() == 280
    boxes = np.array([[1.0, 2, 3, 4]])
    assert transform.apply_box(boxes).tolist() == boxes.tolist()
    assert transform.apply_segmentation(image[..., 0]).tolist() == [[250] * 2] * 2


def test_distribution_of_the_changes():
    seed_all_rng(0)
    augmentation, image = PhotometricDistortion("BGR"), np.zeros((1, 1, 3), np.float32)
    draws = [augmentation.get_transform(image) for _ in range(4000)]
    for name, neutral, low, high in (
        ("brightness", 0.0, -32, 32),
        ("contrast", 1.0, 0.5, 1.5),
        ("saturation", 1.0, 0.5, 1.5),
        ("hue", 0.0, -18, 18),
    ):
        values = np.array([getattr(t, name) for t in draws])
        changed = values[values != neutral]
        assert abs(len(changed) / 4000 - 0.5) < 0.03, name
        assert low <= changed.min() < low + 0.01 * (high - low), name
        assert high - 0.01 * (high - low) < changed.max() <= high, name
        assert abs(changed.mean() - (low + high) / 2) < 0.03 * (high - low), name
    assert abs(np.mean([t.contrast_first for t in draws]) - 0.5) < 0.03
    orders = [t.order for t in draws]
    # half of the images, and a sixth of the permutations is the identity
    assert abs(np.mean([o == (0, 1, 2) for o in orders]) - 7 / 12) < 0.03
    assert len(set(orders)) == 6
    assert {t.channels for t in draws} == {"BGR"}
    flags = np.array([[t.brightness != 0, t.contrast != 1, t.hue != 0] for t in draws])
    assert abs(np.corrcoef(flags.T) - np.eye(3)).max() < 0.05  # drawn independently


def test_deterministic_under_a_seed_and_usable_as_augmentation():
    results = []
    for _ in range(2):
        seed_all_rng(5)
        inputs = T.AugInput(_pixels(), boxes=np.array([[0.0, 0, 3, 3]]))
        PhotometricDistortion()(inputs)
        results.append(inputs.image)
    np.testing.assert_array_equal(*results)
    assert "PhotometricDistortion" in repr(PhotometricDistortion())
