"""Images in a folder for each class: what is listed, cut out, refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.utils.env import seed_all_rng
from PIL import Image

from kd_d2.projects.dicod.classifier_data import classifier_data
from kd_d2.projects.dicod.image_folder import FolderMapper, open_folder
from tests.projects.dicod.crop_cases import class_folder, folder_cfg


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return class_folder(tmp_path_factory.mktemp("folder"), num_images=3)


def saved(path, pixels):
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)
    return {"file_name": str(path), "label": 1}


def ramp(height, width):
    """Red is the column, green the row, blue 7."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([columns, rows, np.full_like(rows, 7)], axis=-1)


def test_classes_and_batches(folder, tmp_path):
    cfg = folder_cfg(folder, tmp_path, **{"CROP_CLASSIFIER.BATCH_SIZE": 4})
    data = classifier_data(cfg)
    assert data.classes(cfg) == ["blue", "green", "red"] == data.test_classes(cfg, "any")
    assert data.num_images(cfg) == 9 and list(data.test_names(cfg)) == [str(folder / "val")]
    batches = list(data.test_loader(cfg, "any"))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    crops = torch.cat([batch["crops"] for batch in batches])
    assert crops.dtype == torch.float32 and crops.shape == (12, 3, 32, 32)
    # RGB: the class is the brightest channel
    assert crops.mean(dim=(2, 3)).argmax(dim=1).tolist() == [2] * 4 + [1] * 4 + [0] * 4
    bgr = folder_cfg(folder, tmp_path, **{"INPUT.FORMAT": "BGR"})
    flipped = torch.cat([batch["crops"] for batch in classifier_data(bgr).test_loader(bgr, "any")])
    assert torch.equal(flipped, crops.flip(1))


def test_an_epoch_has_every_image_once(folder, tmp_path):
    cfg = folder_cfg(folder, tmp_path, **{"CROP_CLASSIFIER.BATCH_SIZE": 9})
    batches = iter(classifier_data(cfg).train_loader(cfg))
    for _ in range(2):
        batch = next(batches)
        assert sorted(batch["labels"].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        brightest = batch["crops"].mean(dim=(2, 3)).argmax(dim=1)
        assert torch.equal(brightest, 2 - batch["labels"])


def test_evaluation_sees_the_middle(tmp_path):
    """Shorter side 32 of 28 x 256/224: not resized; then rows 2 to 29 and columns 14 to 41."""
    mapper = FolderMapper(size=28, image_format="RGB", is_train=False, flip="none")
    out = mapper(saved(tmp_path / "image.png", ramp(32, 56)))
    assert out["label"] == 1 and out["crop"].shape == (3, 28, 28)
    columns, rows, blue = out["crop"]
    assert columns[0].tolist() == list(range(14, 42))
    assert rows[:, 0].tolist() == list(range(2, 30)) and blue.unique().tolist() == [7]
    # resized to 32 x 48
    mapper = FolderMapper(size=28, image_format="RGB", is_train=False)
    crop = mapper(saved(tmp_path / "large.png", ramp(64, 96)))["crop"]
    assert crop[0, 0, 0].item() == pytest.approx(2 * (48 - 28) / 2, abs=1)


def test_training_sees_random_parts(tmp_path):
    record = saved(tmp_path / "image.png", ramp(100, 150))
    mapper = FolderMapper(size=20, image_format="RGB", is_train=True, flip="horizontal")
    seed_all_rng(1)
    crops = [mapper(record)["crop"] for _ in range(60)]
    assert all(crop.shape == (3, 20, 20) for crop in crops)
    widths = torch.stack([(c[0, 0, -1] - c[0, 0, 0]) / 19 * 20 for c in crops])
    heights = torch.stack([(c[1, -1, 0] - c[1, 0, 0]) / 19 * 20 for c in crops])
    mirrored = widths < 0
    assert 15 < mirrored.sum() < 45 and (heights > 0).all()
    area = widths.abs() * heights / 15000
    assert 0.05 < area.min() < 0.3 and 0.6 < area.max() < 1.1
    ratio = widths.abs() / heights
    assert 0.65 < ratio.min() < 0.95 and 1.05 < ratio.max() < 1.5

    upright = FolderMapper(size=20, image_format="RGB", is_train=True)
    assert all((c[0, 0, -1] > c[0, 0, 0]) for c in (upright(record)["crop"] for _ in range(10)))
    down = FolderMapper(size=20, image_format="RGB", is_train=True, flip="vertical")
    turned = [(c[1, -1, 0] < c[1, 0, 0]).item() for c in (down(record)["crop"] for _ in range(20))]
    assert 0 < sum(turned) < 20


def test_grey_and_palette_images_have_three_channels(tmp_path):
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((40, 40, 3), 9, np.uint8)).convert("P").save(tmp_path / "palette.png")
    mapper = FolderMapper(size=20, image_format="RGB", is_train=False)
    for name in ("grey", "palette"):
        crop = mapper({"file_name": str(tmp_path / f"{name}.png"), "label": 0})["crop"]
        assert crop.shape == (3, 20, 20) and (crop - 9).abs().max() < 30


def test_relative_folders_are_below_the_data_sets(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder.parent))
    changes = {"CROP_CLASSIFIER.FOLDER.TRAIN": f"{folder.name}/train"}
    cfg = folder_cfg(folder, tmp_path, **changes)
    assert Path(open_folder(cfg, "TRAIN").root) == folder / "train"


def test_without_a_test_folder(folder, tmp_path):
    cfg = folder_cfg(folder, tmp_path, **{"CROP_CLASSIFIER.FOLDER.TEST": ""})
    assert list(classifier_data(cfg).test_names(cfg)) == []


def test_folders_that_are_refused(folder, tmp_path):
    cases = {
        "": (ValueError, "FOLDER.TRAIN is empty; CROP_CLASSIFIER.MODE 'folder' needs"),
        str(tmp_path / "no"): (FileNotFoundError, "FOLDER.TRAIN was looked for in .*no, which"),
        str(folder / "train" / "red"): (ValueError, "FOLDER.TRAIN is .*red: Couldn't find any"),
    }
    for path, (kind, message) in cases.items():
        cfg = folder_cfg(folder, tmp_path, **{"CROP_CLASSIFIER.FOLDER.TRAIN": path})
        with pytest.raises(kind, match=message):
            classifier_data(cfg).classes(cfg)
    (tmp_path / "classes" / "empty").mkdir(parents=True)
    changes = {"CROP_CLASSIFIER.FOLDER.TRAIN": str(tmp_path / "classes")}
    with pytest.raises(ValueError, match="no valid file for the classes empty"):
        classifier_data(cfg).classes(folder_cfg(folder, tmp_path, **changes))


def test_modes(folder, tmp_path):
    cfg = folder_cfg(folder, tmp_path, **{"CROP_CLASSIFIER.MODE": "folders"})
    with pytest.raises(ValueError, match="MODE must be one of .*folder.*object.* got 'folders'"):
        classifier_data(cfg)
    cfg = folder_cfg(folder, tmp_path, **{"CROP_CLASSIFIER.MODE": "object"})
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty; .*MODE 'folder'"):
        classifier_data(cfg).classes(cfg)
