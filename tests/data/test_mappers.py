"""What bad images and bad annotations do to training."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetFromList, DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image

from kd_d2.data import NamingMapper, RobustDataset


def record(path, width=40, height=20, boxes=((4, 2, 8, 6),)):
    return {
        "file_name": str(path),
        "image_id": str(path),
        "width": width,
        "height": height,
        "annotations": [
            {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for box in boxes
        ],
    }


@pytest.fixture
def mapper(cfg):
    """Detectron2's training mapper without resizing or flipping, so that boxes stay as they are."""
    cfg.INPUT.MIN_SIZE_TRAIN = (20,)
    cfg.INPUT.RANDOM_FLIP = "none"
    return DatasetMapper(cfg, True)


@pytest.fixture
def images(tmp_path):
    """Four good images, each of one colour that tells its number."""
    records = []
    for i in range(4):
        path = tmp_path / f"good{i}.png"
        Image.new("RGB", (40, 20), (10 * i, 0, 0)).save(path)
        records.append(record(path))
    return records


def write_bytes(path):
    path.write_bytes(b"this is not an image")


def write_truncated(path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_nothing(path):
    """The file is missing."""


def write_empty(path):
    path.write_bytes(b"")


def write_other_size(path):
    Image.new("RGB", (41, 20)).save(path, "PNG")


def write_turned(path):
    """40x20 pixels that EXIF data turn by a quarter, annotated as 40x20."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(path, "JPEG", exif=exif)


@pytest.mark.parametrize(
    "write, reason",
    [
        (write_bytes, "UnidentifiedImageError"),
        (write_truncated, "OSError|SyntaxError"),
        (write_nothing, "No such file|FileNotFoundError"),
        (write_empty, "UnidentifiedImageError"),
        (write_other_size, "SizeMismatchError"),
        (write_turned, "SizeMismatchError"),
    ],
)
def test_bad_image_is_replaced_by_the_next_or_stops(
    tmp_path, mapper, images, caplog, write, reason
):
    path = tmp_path / "bad.img"
    write(path)
    records = images[:2] + [record(path)] + images[2:]
    dataset = RobustDataset(DatasetFromList(records), mapper)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert dataset[2]["file_name"] == images[2]["file_name"]
    assert dataset[1]["file_name"] == images[1]["file_name"]
    assert (dataset.num_tried, dataset.num_bad) == (5, 2)
    warnings = [r.getMessage() for r in caplog.records if "Skipped" in r.getMessage()]
    assert len(warnings) == 1  # once per file, though counted every time
    assert str(path) in warnings[0] and "1 of 1 images tried were bad" in warnings[0]

    strict = RobustDataset(DatasetFromList(records), mapper, bad_image="stop")
    strict[1]
    with pytest.raises(ValueError, match=reason) as caught:
        strict[2]
    assert str(path) in str(caught.value) and "BAD_IMAGE" in str(caught.value)

    with pytest.raises(ValueError, match="cannot be used for evaluation") as caught:
        NamingMapper(mapper)(records[2])
    assert str(path) in str(caught.value)


def test_last_image_is_replaced_by_the_first(tmp_path, mapper, images):
    dataset = RobustDataset(DatasetFromList(images + [record(tmp_path / "none.png")]), mapper)
    assert dataset[4]["file_name"] == images[0]["file_name"]


def test_turned_image_with_the_turned_size_is_good(tmp_path, mapper):
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = 200  # right half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: the right half is below
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    dataset = RobustDataset([record(tmp_path / "turned.jpg", 20, 40)], mapper)
    image = dataset[0]["image"]
    assert image.shape == (3, 40, 20)
    assert image[:, :18].max() < 20 and image[:, 22:].min() > 180


def test_images_of_other_modes_become_three_channels(tmp_path, mapper):
    ramp = np.tile(np.arange(40, dtype=np.uint8) * 6, (20, 1))
    grey = Image.fromarray(ramp)
    grey.save(tmp_path / "grey.png")
    Image.merge("LA", [grey, Image.new("L", (40, 20), 7)]).save(tmp_path / "grey_alpha.png")
    Image.merge("RGBA", [grey] * 3 + [Image.new("L", (40, 20), 0)]).save(tmp_path / "rgba.png")
    grey.convert("P").save(tmp_path / "palette.png")
    grey.convert("CMYK").save(tmp_path / "cmyk.tif")
    for name in ("grey.png", "grey_alpha.png", "rgba.png", "palette.png", "cmyk.tif"):
        dataset = RobustDataset([record(tmp_path / name)], mapper, bad_image="stop")
        image = dataset[0]["image"]
        assert image.shape == (3, 20, 40) and image.dtype == torch.uint8, name
        expected = torch.from_numpy(ramp).expand(3, 20, 40)
        assert (image.int() - expected.int()).abs().max() <= 1, name  # alpha is ignored


def test_one_bit_and_sixteen_bit_images_are_read(tmp_path, mapper):
    Image.fromarray(np.eye(20, 40) > 0).save(tmp_path / "bits.png")
    deep = np.zeros((20, 40), dtype=np.uint16)
    deep[:, 20:] = 60000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = RobustDataset([record(tmp_path / "bits.png")], mapper)[0]["image"]
    assert torch.equal(image[1] == 255, torch.eye(20, 40) > 0)
    image = RobustDataset([record(tmp_path / "deep.png")], mapper)[0]["image"]
    assert image[:, :, :20].max() == 0 and image[:, :, 20:].min() > 200


def test_boxes_are_clipped_and_empty_ones_dropped(tmp_path, mapper, images):
    boxes = (
        (-10, -10, 5, 5),  # reaches over the corner
        (35, 15, 90, 90),
        (5, 5, 5, 10),  # no area
        (50, 5, 60, 10),  # outside
        (3, 3, 9, 9),
    )
    item = RobustDataset([record(images[0]["file_name"], boxes=boxes)], mapper)[0]
    assert item["instances"].gt_boxes.tensor.tolist() == [
        [0, 0, 5, 5],
        [35, 15, 40, 20],
        [3, 3, 9, 9],
    ]
    item = RobustDataset([record(images[0]["file_name"], boxes=boxes[2:4])], mapper)[0]
    assert len(item["instances"]) == 0


def test_malformed_annotation_counts_as_a_bad_image(images, mapper):
    broken = record(images[0]["file_name"])
    broken["annotations"][0]["bbox"] = [1, 2, 3]
    dataset = RobustDataset([broken, images[1]], mapper)
    assert dataset[0]["file_name"] == images[1]["file_name"] and dataset.num_bad == 1


def test_long_run_with_few_bad_images_goes_on_and_with_many_stops():
    def mapper(item):
        if item["bad"]:
            raise OSError("broken")
        return item["file_name"]

    def items(bad):
        return [{"file_name": f"{i}.jpg", "bad": i in bad} for i in range(100)]

    dataset = RobustDataset(items({7, 50}), mapper)
    for _ in range(5):
        for i in range(100):
            assert dataset[i] == f"{i + (i in {7, 50})}.jpg"
    # Each bad one is tried once per pass and replaced by one more try.
    assert (dataset.num_tried, dataset.num_bad) == (510, 10)

    dataset = RobustDataset(items(set(range(0, 100, 5))), mapper, max_bad_fraction=0.1)
    with pytest.raises(ValueError, match="MAX_BAD_FRACTION") as caught:
        for i in range(100):
            dataset[i]
    assert 50 <= dataset.num_tried < 60
    assert f"{dataset.num_bad} of {dataset.num_tried}" in str(caught.value)
    assert ".jpg (OSError: broken)" in str(caught.value)

    dataset = RobustDataset(items(set(range(100)))[:20], mapper, max_bad_fraction=1.0)
    with pytest.raises(ValueError, match="None of the 20 training images can be used.*broken"):
        dataset[3]


def test_mapper_that_returns_none_skips_without_counting():
    dataset = RobustDataset([0, 1, 2], lambda x: x if x == 1 else None)
    assert dataset[2] == 1 and dataset.num_bad == 0
    with pytest.raises(ValueError, match="returned None"):
        RobustDataset([{}, {}], lambda x: None)[0]


def test_random_numbers_are_left_to_the_mapper(tmp_path, images, mapper):
    records = [record(tmp_path / "missing.png")] + images
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    RobustDataset(records, lambda item: mapper.image_format and Image.open(item["file_name"]))[0]
    assert np.array_equal(np.random.get_state()[1], before)


def test_memory_error_is_no_bad_image():
    def mapper(item):
        raise MemoryError

    with pytest.raises(MemoryError):
        RobustDataset([{}], mapper)[0]
    with pytest.raises(MemoryError):
        NamingMapper(mapper)({})


@pytest.mark.parametrize(
    "values, key", [({"bad_image": "ignore"}, "BAD_IMAGE"), ({"max_bad_fraction": 2}, "MAX_BAD")]
)
def test_unknown_values_are_refused(values, key):
    with pytest.raises(ValueError, match=f"DATALOADER.{key}"):
        RobustDataset([], print, **values)
