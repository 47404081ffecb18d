"""Geometric distortion of crops: what it does to pixels, and when it happens."""

import math

import pytest
import torch

from kd_d2.projects.dicod.crop_dataset import build_crop_test_loader, build_crop_train_loader
from kd_d2.projects.dicod.crop_distortion import CropDistortion, build_crop_distortion
from tests.projects.dicod.crop_cases import annotation, classifier_cfg, coco_dataset

SIZE = 24


def ramp(size=SIZE):
    """(2, size, size): the x and the y of every pixel's centre."""
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return torch.stack([x, y])


def inner(maps, border=6):
    return maps[:, border:-border, border:-border]


def test_a_fixed_factor_is_a_bilinear_zoom_about_the_middle():
    crop = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = CropDistortion(size=8, scale=(2.0, 2.0))(crop)

    def value(channel, y, x):  # edges are repeated
        return crop[channel, min(max(y, 0), 7), min(max(x, 0), 7)].item()

    for row in range(8):
        for column in range(8):
            y, x = 4 + (row + 0.5 - 4) / 2 - 0.5, 4 + (column + 0.5 - 4) / 2 - 0.5
            i, j = math.floor(y), math.floor(x)
            expected = sum(
                (1 - abs(y - i - a)) * (1 - abs(x - j - b)) * value(1, i + a, j + b)
                for a in (0, 1)
                for b in (0, 1)
            )
            assert found[1, row, column].item() == pytest.approx(expected, abs=1e-4)


def test_rotations_go_both_ways_and_no_further():
    torch.manual_seed(0)
    distort = CropDistortion(size=SIZE, degrees=10.0)
    angles = []
    for _ in range(40):
        dx = inner(distort(ramp())).diff(dim=2).mean(dim=(1, 2))
        angles.append(math.degrees(math.atan2(dx[1], dx[0])))
        assert dx.norm().item() == pytest.approx(1, abs=1e-3)  # lengths stay
    assert -10.01 < min(angles) < -5 and 5 < max(angles) < 10.01


def test_shifts_are_a_part_of_the_side():
    torch.manual_seed(0)
    distort = CropDistortion(size=SIZE, translate=0.25)
    shifts = torch.stack([inner(distort(ramp()) - ramp()).mean(dim=(1, 2)) for _ in range(60)])
    assert 4 < shifts.abs().max().item() <= 6  # a quarter of 24 pixels


def test_elastic_displacement_is_smoothed_noise():
    """Noise in [-1, 1] has the deviation 1 / sqrt(3), a Gaussian leaves 1 / (2 sqrt(pi) sigma)."""
    torch.manual_seed(0)
    distort = CropDistortion(size=SIZE, alpha=60.0, sigma=3.0)
    moved = torch.stack([inner(distort(ramp()) - ramp()) for _ in range(30)])
    # torchvision counts a displacement in halves of the side
    expected = 60.0 / 2 / math.sqrt(3) / (2 * math.sqrt(math.pi) * 3.0)
    assert moved.std().item() == pytest.approx(expected, rel=0.15)
    neighbours = (moved[..., 1:] - moved[..., :-1]).std() / moved.std()
    assert neighbours < 0.4  # smooth


def test_borders_have_no_colour_of_their_own():
    crop = torch.full((3, SIZE, SIZE), 77.0)
    distort = CropDistortion(
        size=SIZE, degrees=20, shear=10, scale=(0.8, 1.2), translate=0.1, alpha=40.0
    )
    torch.testing.assert_close(distort(crop), crop, atol=1e-3, rtol=0)


def test_nothing_by_default_and_mistakes_name_the_key(tmp_path):
    assert build_crop_distortion(classifier_cfg(tmp_path, "any")) is None
    wrong = {
        "CROP_CLASSIFIER.AFFINE.SCALE": (1.2, 0.8),
        "CROP_CLASSIFIER.ELASTIC.ALPHA": -1.0,
    }
    cfg = classifier_cfg(tmp_path, "any", **wrong)
    with pytest.raises(ValueError, match="CROP_CLASSIFIER.AFFINE.SCALE, .*ELASTIC.ALPHA: out of"):
        build_crop_distortion(cfg)


def test_training_crops_only(tmp_path):
    with coco_dataset(tmp_path, [annotation([10, 20, 32, 32], 1)], sizes=[(90, 120)]) as name:
        (plain,) = build_crop_test_loader(classifier_cfg(tmp_path, name), name)
        distorted = {"CROP_CLASSIFIER.AFFINE.DEGREES": 30.0, "CROP_CLASSIFIER.BATCH_SIZE": 1}
        cfg = classifier_cfg(tmp_path, name, **distorted)
        (evaluated,) = build_crop_test_loader(cfg, name)
        assert torch.equal(plain["crops"], evaluated["crops"])
        trained = next(iter(build_crop_train_loader(cfg)))["crops"]
        flipped = plain["crops"].flip(-1)
        assert min((trained - image).abs().mean() for image in (plain["crops"], flipped)) > 1
