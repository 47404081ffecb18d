"""digit-scenes: boxes from the pixels, splits without shared material, same bytes, atomic."""

import hashlib
import json
import math
import multiprocessing
import os
import time

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from kd_d2.data import (
    DigitScenesParams,
    build_digit_scenes,
    dataset_classes,
)
from kd_d2.data import digit_scenes as module
from kd_d2.data import (
    digit_scenes_paths,
    register_all,
    scenes,
)

SMALL = dict(num_train=6, num_val=3, image_size=64, digit_size=(16, 40), seed=5)
# sha256 of the JSON files and of all files with the parameters SMALL.
FROZEN_ANNOTATIONS = "c2a94120d0e579f849dd4768e50f0d352358e11f8c139465570b6ddfe28a1777"
FROZEN_ALL = "35c8b3ad1c75f84fbc5d2a3eb6a73fd4561dae8251fcf924545e1a506bad59d8"


@pytest.fixture(scope="module")
def material():
    return scenes.load_material()


def files_of(folder):
    """Relative path -> content of every file below a folder."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = file.read()
    return found


def visible_masks(scene, size):
    """Per digit the pixels (H, W) of which it is the topmost; written with plain loops."""
    topmost = [[-1] * size for _ in range(size)]
    for number, digit in enumerate(scene.digits):
        for row, values in enumerate(digit.alpha.tolist()):
            for column, alpha in enumerate(values):
                y, x = row + digit.top, column + digit.left
                if alpha >= 128 and 0 <= y < size and 0 <= x < size:
                    topmost[y][x] = number
    topmost = np.array(topmost)
    return [topmost == number for number in range(len(scene.digits))]


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_are_tight_around_the_visible_pixels(material, split):
    params = DigitScenesParams(digits_per_image=(3, 8), image_size=96)
    hidden_somewhere = 0
    for index in range(15):
        scene = scenes.render_scene(params, split, index, material[split])
        assert len(scene.boxes) == len(scene.digits) >= 1
        for mask, box, digit in zip(visible_masks(scene, 96), scene.boxes, scene.digits):
            ys, xs = np.nonzero(mask)
            x, y, width, height = box
            assert (x, y) == (xs.min(), ys.min())
            assert (x + width - 1, y + height - 1) == (xs.max(), ys.max())
            total = (digit.alpha >= 128).sum()
            assert mask.sum() >= 0.8 * total  # max_occlusion is 20 %
            hidden_somewhere += mask.sum() < total
    assert hidden_somewhere > 5  # occlusion does happen


def test_pixels_are_background_or_one_colour_per_digit(material):
    params = DigitScenesParams(digits_per_image=(4, 4))
    empty = DigitScenesParams(digits_per_image=(0, 0))
    for index in range(5):
        scene = scenes.render_scene(params, "train", index, material["train"])
        background = scenes.render_scene(empty, "train", index, material["train"])
        assert not background.digits and background.image.max() <= 255 * 50 // 100
        touched = np.zeros((128, 128), dtype=int)
        opaque = np.full((128, 128), -1)
        for number, digit in enumerate(scene.digits):
            for row, column in np.argwhere(digit.alpha > 0):
                y, x = row + digit.top, column + digit.left
                if 0 <= y < 128 and 0 <= x < 128:
                    touched[y, x] += 1
                    if digit.alpha[row, column] == 255:
                        opaque[y, x] = number
        assert np.array_equal(scene.image[touched == 0], background.image[touched == 0])
        for number in range(len(scene.digits)):
            colours = scene.image[(opaque == number) & (touched == 1)]
            assert len(np.unique(colours, axis=0)) == 1
            brightest, darkest = int(colours[0].max()), int(colours[0].min())
            assert 170 <= brightest <= 255
            assert darkest >= brightest * 40 // 100  # saturation up to 60 %


@pytest.mark.parametrize("side, degrees", [(20, 0), (33, 17), (64, -20), (47, 90)])
def test_drawn_digit_equals_floating_point_interpolation(side, degrees):
    sample = load_digits().images[3]
    alpha = scenes._draw_digit(sample.astype(np.int64), side, degrees)
    size = alpha.shape[0]
    assert size >= side * (abs(math.cos(math.radians(degrees))))
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    expected = np.zeros((size, size))
    for y in range(size):
        for x in range(size):
            dx, dy = x - (size - 1) / 2, y - (size - 1) / 2
            u = (c * dx + s * dy) * 8 / side + 3.5
            v = (c * dy - s * dx) * 8 / side + 3.5
            value = 0.0
            for row in range(8):  # every sample is a tent of half-width 1
                for column in range(8):
                    tent = max(0, 1 - abs(u - column)) * max(0, 1 - abs(v - row))
                    value += tent * sample[row, column]
            expected[y, x] = np.clip((value - 4.5) / 5 * 255, 0, 255)
    assert np.abs(alpha - expected).max() < 2.5  # of 255; fixed point and rounding down
    assert alpha.max() == 255


def test_splits_share_neither_digits_nor_photographs(material):
    targets = load_digits().target
    split = scenes.split_digits(targets)
    train, val = np.concatenate(split["train"]), np.concatenate(split["val"])
    assert not set(train) & set(val)
    assert sorted(np.concatenate([train, val])) == list(range(1797))
    for digit in range(10):
        count = (targets == digit).sum()
        assert len(split["train"][digit]) == int(0.8 * count)
        assert (targets[split["val"][digit]] == digit).all()
    for i, photograph in enumerate(load_sample_images().images):
        left, right = material["train"].photographs[i], material["val"].photographs[i]
        assert left.shape[1] == 448 and right.shape[1] == 192
        assert np.array_equal(np.concatenate([left, right], axis=1), photograph)


def test_draws_are_uniform_and_include_both_ends():
    draws = scenes._Draws(1, 2, 3)
    counts = np.bincount([draws.between(2, 6) for _ in range(5000)], minlength=8)
    assert counts[:2].sum() == 0 and counts[7] == 0
    assert (abs(counts[2:7] - 1000) < 150).all()
    assert scenes._Draws(1, 2, 3).between(0, 10**6) == scenes._Draws(1, 2, 3).between(0, 10**6)


def test_files_are_the_same_bytes_everywhere(tmp_path):
    first = build_digit_scenes(str(tmp_path / "one"), progress=False, **SMALL)
    second = build_digit_scenes(str(tmp_path / "two"), progress=False, **SMALL)
    contents = files_of(first.directory)
    assert contents == files_of(second.directory)
    assert len([name for name in contents if name.endswith(".png")]) == 9
    annotations = hashlib.sha256()
    for name in ("instances_train.json", "instances_val.json"):
        annotations.update(contents[name])
    assert annotations.hexdigest() == FROZEN_ANNOTATIONS
    hashes = [
        hashlib.sha256(np.ascontiguousarray(i)).hexdigest() for i in load_sample_images().images
    ]
    if tuple(hashes) == scenes.PHOTOGRAPH_HASHES:  # the usual JPEG decoder
        assert json.loads(contents["manifest.json"])["sha256"] == FROZEN_ALL


def test_files_decode_to_the_rendered_scenes(tmp_path, material):
    # 160 pixels: 77 KB, more than one stored block.
    values = dict(SMALL, num_train=2, num_val=1, image_size=160)
    paths = build_digit_scenes(str(tmp_path), progress=False, **values)
    params = DigitScenesParams(**values)
    content = json.load(open(paths.train_json))
    assert [c["name"] for c in content["categories"]] == list("0123456789")
    for index, image in enumerate(content["images"]):
        scene = scenes.render_scene(params, "train", index, material["train"])
        with Image.open(os.path.join(paths.train_images, image["file_name"])) as file:
            assert file.format == "PNG" and file.mode == "RGB"
            assert np.array_equal(np.asarray(file), scene.image)
        found = [
            (a["category_id"] - 1, tuple(a["bbox"]))
            for a in content["annotations"]
            if a["image_id"] == image["id"]
        ]
        assert found == [(d.digit, box) for d, box in zip(scene.digits, scene.boxes)]


def test_a_scene_depends_on_its_index_and_seed_only(tmp_path, material):
    few, many = DigitScenesParams(num_train=1), DigitScenesParams(num_train=500)
    other = DigitScenesParams(seed=1)
    images = [
        scenes.render_scene(p, "train", 7, material["train"]).image for p in (few, many, other)
    ]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert len({digit_scenes_paths("", p).directory for p in (few, many, other)}) == 3


def damage_image(paths):
    with open(os.path.join(paths.train_images, "000002.png"), "r+b") as file:
        file.truncate(100)


def remove_image(paths):
    os.remove(os.path.join(paths.val_images, "000001.png"))


def remove_manifest(paths):
    os.remove(paths.manifest)


@pytest.mark.parametrize("damage", [damage_image, remove_image, remove_manifest])
def test_incomplete_folder_is_made_again(tmp_path, damage):
    paths = build_digit_scenes(str(tmp_path), progress=False, **SMALL)
    contents = files_of(paths.directory)
    damage(paths)
    build_digit_scenes(str(tmp_path), progress=False, **SMALL)
    assert files_of(paths.directory) == contents
    left = [n for n in os.listdir(os.path.dirname(paths.directory)) if n.startswith(".")]
    assert not left


def test_complete_folder_is_used_as_it_is(tmp_path, monkeypatch):
    paths = build_digit_scenes(str(tmp_path), progress=False, **SMALL)
    monkeypatch.setattr(module, "_generate", lambda *_: pytest.fail("generated again"))
    assert build_digit_scenes(str(tmp_path), progress=False, **SMALL) == paths


def test_folders_of_killed_processes_are_removed_in_time(tmp_path):
    parent = tmp_path / "digit_scenes"
    for name, age in (("old", 7200), ("new", 60)):
        folder = parent / f".generating.{name}" / "train"
        folder.mkdir(parents=True)
        (folder / "000001.png").write_bytes(b"")
        os.utime(folder, (time.time() - age,) * 2)
    build_digit_scenes(str(tmp_path), progress=False, **SMALL)
    left = [name for name in os.listdir(parent) if name.startswith(".")]
    assert left == [".generating.new"]


def test_failure_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "render_scene", fail)
    with pytest.raises(OSError, match="disk full"):
        build_digit_scenes(str(tmp_path), progress=False, **SMALL)
    parent = tmp_path / "digit_scenes"
    assert [n for n in os.listdir(parent) if not n.endswith(".lock")] == []


def _build_in_process(root, queue):
    queue.put(build_digit_scenes(root, progress=False, **SMALL).directory)


def test_several_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=_build_in_process, args=(str(tmp_path / "shared"), queue))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    directories = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    alone = build_digit_scenes(str(tmp_path / "alone"), progress=False, **SMALL)
    (directory,) = directories
    assert files_of(directory) == files_of(alone.directory)


@pytest.mark.parametrize(
    "values, key",
    [
        ({"num_train": 0}, "NUM_TRAIN"),
        ({"digit_size": (40, 20)}, "DIGIT_SIZE"),
        ({"digit_size": (20, 65), "image_size": 64}, "DIGIT_SIZE"),
        ({"digits_per_image": (1, 2, 3)}, "DIGITS_PER_IMAGE"),
        ({"max_occlusion": 0.4}, "MAX_OCCLUSION"),
        ({"brightness": (0, 300)}, "BRIGHTNESS"),
        ({"seed": -1}, "SEED"),
    ],
)
def test_refused_parameters_are_named(values, key):
    with pytest.raises(ValueError, match=f"DATASETS.DIGIT_SCENES.{key} = "):
        DigitScenesParams(**values)


def test_config_defaults_are_the_defaults(cfg):
    assert DigitScenesParams.from_config(cfg) == DigitScenesParams()


def test_registration_is_lazy_and_idempotent(cfg, tmp_path):
    for key, value in SMALL.items():
        setattr(cfg.DATASETS.DIGIT_SCENES, key.upper(), value)
    register_all(cfg, str(tmp_path))
    assert os.listdir(tmp_path) == []
    loader = DatasetCatalog.data["digit_scenes_train"]
    metadata = MetadataCatalog.get("digit_scenes_train")
    paths = digit_scenes_paths(str(tmp_path), DigitScenesParams(**SMALL))
    assert metadata.json_file == paths.train_json and metadata.evaluator_type == "coco"
    assert dataset_classes("digit_scenes_val") == list("0123456789")
    assert os.listdir(tmp_path) == []

    assert len(DatasetCatalog.get("digit_scenes_train")) == 6
    assert len(DatasetCatalog.get("digit_scenes_val")) == 3
    register_all(cfg, str(tmp_path))
    assert DatasetCatalog.data["digit_scenes_train"] is loader

    cfg.DATASETS.DIGIT_SCENES.NUM_VAL = 2
    register_all(cfg, str(tmp_path))
    assert DatasetCatalog.data["digit_scenes_train"] is not loader
    assert len(DatasetCatalog.get("digit_scenes_val")) == 2


def test_loaded_boxes_and_classes_are_those_of_the_scenes(cfg, tmp_path, material):
    for key, value in SMALL.items():
        setattr(cfg.DATASETS.DIGIT_SCENES, key.upper(), value)
    register_all(cfg, str(tmp_path))
    for index, record in enumerate(DatasetCatalog.get("digit_scenes_val")):
        scene = scenes.render_scene(DigitScenesParams(**SMALL), "val", index, material["val"])
        assert (record["height"], record["width"]) == (64, 64)
        loaded = [(a["category_id"], tuple(a["bbox"])) for a in record["annotations"]]
        assert loaded == [(d.digit, box) for d, box in zip(scene.digits, scene.boxes)]
