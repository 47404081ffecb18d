"""Images of the analyses."""

import numpy as np
import pytest
import torch

from kd_d2.data import choose_indices
from kd_d2.projects.crosskd.analysis.images import load_images, rgb_picture
from tests.fixtures import registered_toy_dataset, tiny_cfg


def test_listed_indices_come_first():
    assert choose_indices(10, "3, 7,0", 2) == [3, 7, 0]
    assert choose_indices(10, "", 3) == [1, 5, 8]
    assert choose_indices(2, "", 5) == [0, 1]


@pytest.mark.parametrize("listed, count, wrong", [("3,10", 1, "10"), ("a", 1, "a"), ("", 0, "0")])
def test_what_is_no_index_is_named(listed, count, wrong):
    with pytest.raises(ValueError, match=f"got '?{wrong}"):
        choose_indices(10, listed, count)


def test_targets_are_resized_with_the_image(tmp_path):
    with registered_toy_dataset(tmp_path, 3, size=(64, 96)) as name:
        cfg = tiny_cfg("GFL", **{"INPUT.MIN_SIZE_TEST": 128, "INPUT.MAX_SIZE_TEST": 500})
        (record,) = load_images(cfg, name, listed="2")
        from detectron2.data import DatasetCatalog

        annotated = DatasetCatalog.get(name)[2]
    assert record["index"] == 2 and record["image"].shape == (3, 128, 192)
    x, y, w, h = annotated["annotations"][1]["bbox"]
    expected = 2 * torch.tensor([x, y, x + w, y + h], dtype=torch.float32)
    torch.testing.assert_close(record["instances"].gt_boxes.tensor[1], expected)


def test_pictures_are_rgb():
    image = torch.arange(3, dtype=torch.uint8)[:, None, None].expand(3, 2, 4)
    assert rgb_picture({"image": image}, "RGB")[0, 0].tolist() == [0, 1, 2]
    picture = rgb_picture({"image": image}, "BGR")
    assert picture[0, 0].tolist() == [2, 1, 0] and picture.shape == (2, 4, 3)
    assert picture.dtype == np.uint8
    with pytest.raises(ValueError, match="INPUT.FORMAT.*YUV"):
        rgb_picture({"image": image}, "YUV")
