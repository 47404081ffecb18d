"""What pixels a crop has, and that batches come in the same order again."""

import itertools
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from PIL import Image

from kd_d2.data import PhotometricDistortion, build_mapper
from kd_d2.projects.dicod.crop_dataset import (
    CropMapper,
    CropRecords,
    OnlineCropLoader,
    OnlineCropMapper,
    build_crop_test_loader,
    build_crop_train_loader,
    num_training_crops,
)
from kd_d2.projects.dicod.crop_files import patch_bounds, write_crop_files
from kd_d2.projects.dicod.crop_index import build_crop_index
from tests.projects.dicod.crop_cases import MEAN, annotation, classifier_cfg, coco_dataset

BOXES = [
    [10, 20, 32, 32],  # as large as the crop: an exact copy
    [30.3, 11.7, 50.9, 60.2],
    [-12.5, -3.25, 40, 30],
    [100.5, 70.5, 60, 60],
    [60, 40, 1.0, 1.0],
    [0, 0, 120, 90],
]


@pytest.fixture
def dataset(tmp_path):
    annotations = [annotation(box, i % 3 + 1) for i, box in enumerate(BOXES)]
    annotations += [annotation([5.0, 5.0, 20.0, 20.0], 3, image_id=2)]
    with coco_dataset(tmp_path, annotations, sizes=[(90, 120), (40, 50)]) as name:
        yield name


def pixels(name, i=0):
    folder = MetadataCatalog.get(name).image_root
    return np.asarray(Image.open(f"{folder}/{i}.png")).astype(np.float64)


def naive_crop(image, box, size):
    """Bilinear by the definition: output j reads x1 + (j + 1/2) (x2 - x1) / size; pixel i has its
    value at i + 1/2; beyond the border is the mean; the box is clipped to the image."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = np.clip(box, 0, [width, height, width, height])

    def value(y, x):
        return image[y, x] if 0 <= y < height and 0 <= x < width else np.array(MEAN)

    result = np.zeros((size, size, 3))
    for row in range(size):
        for column in range(size):
            x = x1 + (column + 0.5) * (x2 - x1) / size - 0.5
            y = y1 + (row + 0.5) * (y2 - y1) / size - 0.5
            i, j = math.floor(x), math.floor(y)
            for a, b in itertools.product((0, 1), (0, 1)):
                weight = (1 - abs(x - i - a)) * (1 - abs(y - j - b))
                result[row, column] += weight * value(j + b, i + a)
    return result.transpose(2, 0, 1)


def mapper(**changes):
    return CropMapper(**{"size": 32, "image_format": "RGB", "fill": MEAN, **changes})


def test_crops_are_bilinear_samples_of_the_original_image(dataset):
    index = build_crop_index(dataset, progress=False)
    records = CropRecords([index])
    image = pixels(dataset)
    for i in range(len(BOXES)):
        mapped = mapper()(records[i])
        assert mapped["crop"].dtype == torch.float32 and mapped["crop"].shape == (3, 32, 32)
        assert mapped["label"] == i % 3
        expected = naive_crop(image, index.boxes[i], 32)
        np.testing.assert_allclose(mapped["crop"].numpy(), expected, atol=0.02, err_msg=str(i))
    copy = mapper()(records[0])["crop"].numpy()
    np.testing.assert_allclose(copy, image[20:52, 10:42].transpose(2, 0, 1), atol=3e-3)


def test_order_of_channels(dataset):
    record = CropRecords([build_crop_index(dataset, progress=False)])[2]
    rgb = mapper()(record)["crop"]
    bgr = mapper(image_format="BGR", fill=MEAN[::-1])(record)["crop"]
    torch.testing.assert_close(bgr, rgb.flip(0))


def test_image_files_give_the_same_crops(dataset, tmp_path):
    index = build_crop_index(dataset, progress=False)
    folder = str(tmp_path / "crops")
    write_crop_files(index, folder, progress=False)
    from_files = CropRecords([index], folder)
    for i in range(len(index)):
        assert "patch_file" in from_files[i]
        ours, theirs = mapper()(from_files[i])["crop"], mapper()(CropRecords([index])[i])["crop"]
        assert torch.equal(ours, theirs)
    (tmp_path / "crops" / dataset / "complete.json").write_text('{"fingerprint": "other"}')
    with pytest.raises(ValueError, match="other annotations"):
        CropRecords([index], folder)
    with pytest.raises(ValueError, match="does not hold all crops"):
        CropRecords([index], str(tmp_path))


def test_patches_hold_what_bilinear_sampling_reads():
    assert patch_bounds([10, 20, 42, 52], 120, 90) == (9, 19, 43, 53)
    assert patch_bounds([10.2, 20.9, 41.1, 52], 120, 90) == (9, 19, 43, 53)
    assert patch_bounds([-5, 0.5, 130, 100], 120, 90) == (0, 0, 120, 90)
    assert patch_bounds([119.5, 89.5, 170, 140], 120, 90) == (118, 88, 120, 90)


def test_several_indices_in_a_row(dataset, tmp_path):
    with coco_dataset(tmp_path, [annotation([1, 2, 3, 4], 2)]) as other:
        indices = [build_crop_index(name, progress=False) for name in (other, dataset)]
        records = CropRecords([*indices, indices[0]])
        assert len(records) == 9
        boxes = [records[i]["box"].tolist() for i in range(9)]
    assert boxes[0] == boxes[8] == [1, 2, 4, 6]
    assert boxes[1:8] == indices[1].boxes.tolist()


def test_augmentation_is_the_students(dataset, tmp_path):
    record = CropRecords([build_crop_index(dataset, progress=False)])[1]
    plain = mapper()(record)["crop"]

    def drawn(**changes):
        cfg = classifier_cfg(tmp_path, dataset, **changes)
        loader = build_crop_train_loader(cfg)
        train_mapper = loader._build(loader.sampler).dataset.dataset.mapper
        seed_all_rng(1)
        return [train_mapper(record)["crop"] for _ in range(40)]

    crops = drawn()
    flipped = [torch.equal(crop, plain.flip(2)) for crop in crops]
    assert all(torch.equal(crop, plain) != flip for crop, flip in zip(crops, flipped))
    assert 10 <= sum(flipped) <= 30
    crops = drawn(**{"INPUT.RANDOM_FLIP": "vertical"})
    assert any(torch.equal(crop, plain.flip(1)) for crop in crops)
    assert all(torch.equal(c, plain) for c in drawn(**{"INPUT.RANDOM_FLIP": "none"}))

    photometric = {"INPUT.RANDOM_FLIP": "none", "CROP_CLASSIFIER.PHOTOMETRIC": True}
    crops = drawn(**photometric)
    seed_all_rng(1)
    for crop in crops:
        transform = PhotometricDistortion("RGB").get_transform(None)
        expected = transform.apply_image(plain.numpy().transpose(1, 2, 0))
        np.testing.assert_allclose(crop.numpy(), expected.transpose(2, 0, 1), atol=1e-3)
    assert len({round(float(crop.mean()), 3) for crop in crops}) > 20


def test_validation_sees_every_crop_once_and_as_it_is(dataset, tmp_path):
    cfg = classifier_cfg(tmp_path, dataset, **{"CROP_CLASSIFIER.PHOTOMETRIC": True})
    batches = list(build_crop_test_loader(cfg, dataset))
    assert [len(batch["labels"]) for batch in batches] == [4, 3]
    crops = torch.cat([batch["crops"] for batch in batches])
    records = CropRecords([build_crop_index(dataset, progress=False)])
    assert torch.equal(crops, torch.stack([mapper()(records[i])["crop"] for i in range(7)]))
    assert torch.cat([b["labels"] for b in batches]).tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert num_training_crops(cfg) == 7


def test_an_epoch_has_every_crop_once(dataset, tmp_path):
    cfg = classifier_cfg(
        tmp_path, dataset, **{"CROP_CLASSIFIER.BATCH_SIZE": 7, "INPUT.RANDOM_FLIP": "none"}
    )
    seed_all_rng(0)
    loader = build_crop_train_loader(cfg)
    first, second, third = itertools.islice(loader, 3)
    whole = next(iter(build_crop_test_loader(cfg, dataset)))
    for batch in (first, second):
        order = [int((whole["crops"] == c).flatten(1).all(1).nonzero()) for c in batch["crops"]]
        assert sorted(order) == list(range(7))
        assert batch["labels"].tolist() == whole["labels"][order].tolist()
    assert not torch.equal(first["crops"], second["crops"])
    loader.rewind(2)
    assert torch.equal(next(iter(loader))["crops"], third["crops"])


@pytest.mark.parametrize("mode", ["object", "online"])
def test_the_same_seed_gives_the_same_batches_also_from_the_middle(dataset, tmp_path, mode):
    changes = {
        "CROP_CLASSIFIER.MODE": mode,
        "CROP_CLASSIFIER.SHUFFLE_BUFFER": 9,
        "INPUT.MIN_SIZE_TRAIN": (60, 80),
        "INPUT.MAX_SIZE_TRAIN": 100,
    }
    cfg = classifier_cfg(tmp_path, dataset, **changes)

    def batches(loader, start, count):
        seed_all_rng(100)
        loader.rewind(start)
        return list(itertools.islice(loader, count))

    def loader(seed):
        seed_all_rng(seed)
        return build_crop_train_loader(cfg)

    first = loader(5)
    state = first.state_dict()
    expected = batches(first, 0, 3)
    middle = batches(first, 2, 3)
    resumed = loader(6)
    resumed.load_state_dict(state)
    for ours, theirs in zip(batches(resumed, 2, 3) + batches(loader(5), 0, 3), middle + expected):
        assert ours["crops"].shape == (4, 3, 32, 32) and ours["labels"].shape == (4,)
        assert torch.equal(ours["crops"], theirs["crops"])
        assert torch.equal(ours["labels"], theirs["labels"])
    # the position counts: the same random numbers elsewhere in the stream
    pairs = zip(middle, batches(first, 1, 3))
    assert not all(torch.equal(ours["crops"], theirs["crops"]) for ours, theirs in pairs)
    # without the state the order is another one
    assert not torch.equal(batches(loader(6), 0, 1)[0]["crops"], expected[0]["crops"])


def test_online_crops_are_those_of_the_mapped_image(dataset, tmp_path):
    image = pixels(dataset)
    instances = Instances((90, 120))
    # as a mapper leaves them: clipped
    instances.gt_boxes = Boxes([[10, 20, 42, 52], [0, 0, 27.5, 26.75], [100.5, 70.5, 120, 90]])
    instances.gt_classes = torch.tensor([2, 0, 1])
    mapped = {"image": torch.as_tensor(image.transpose(2, 0, 1)).byte(), "instances": instances}
    result = OnlineCropMapper(lambda record: mapped, size=32, fill=MEAN)({})
    assert result["labels"].tolist() == [2, 0, 1]
    for crop, box in zip(result["crops"], instances.gt_boxes):
        np.testing.assert_allclose(crop.numpy(), naive_crop(image, box.numpy(), 32), atol=0.02)
    assert OnlineCropMapper(lambda record: None, size=32, fill=MEAN)({}) is None

    # the real mapper: rescaled images, every box that survives, none of an image without boxes
    record = DatasetCatalog.get(dataset)[1]
    resize = {"INPUT.MIN_SIZE_TRAIN": (20,), "INPUT.RANDOM_FLIP": "none"}
    student = build_mapper(classifier_cfg(tmp_path, dataset, **resize), True)
    online = OnlineCropMapper(student, size=8, fill=MEAN)
    seen = student(record)["image"].numpy().transpose(1, 2, 0)
    assert seen.shape == (20, 25, 3)  # half the size
    np.testing.assert_allclose(
        online(record)["crops"][0].numpy(), naive_crop(seen, [2.5, 2.5, 12.5, 12.5], 8), atol=0.02
    )
    empty = online({**record, "annotations": []})
    assert empty["crops"].shape == (0, 3, 8, 8) and empty["labels"].shape == (0,)


def test_the_buffer_mixes_images_and_loses_no_crop():
    """Image k has 5 crops whose pixels are k."""
    images = [
        {"crops": torch.full((5, 1, 2, 2), float(k)), "labels": torch.full((5,), k)}
        for k in range(30)
    ]
    seed_all_rng(0)
    loader = OnlineCropLoader(
        [images[i : i + 2] for i in range(0, 30, 2)], batch_size=8, buffer_size=40
    )
    batches = list(loader)
    assert all(b["crops"].shape == (8, 1, 2, 2) for b in batches)
    assert all(torch.equal(b["crops"][:, 0, 0, 0], b["labels"].float()) for b in batches)
    drawn = torch.cat([b["labels"] for b in batches])
    assert torch.bincount(drawn).max() <= 5
    assert len(drawn) == 150 - 38 and np.mean([b["labels"].unique().numel() for b in batches]) > 5


def test_refusals(dataset, tmp_path):
    with pytest.raises(ValueError, match="MODE must be one of"):
        build_crop_train_loader(
            classifier_cfg(tmp_path, dataset, **{"CROP_CLASSIFIER.MODE": "objects"})
        )
    with pytest.raises(ValueError, match="BATCH_SIZE is 0"):
        build_crop_test_loader(
            classifier_cfg(tmp_path, dataset, **{"CROP_CLASSIFIER.BATCH_SIZE": 0}), dataset
        )
