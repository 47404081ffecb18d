"""Toy data sets on disk, and catalogs that are as before after each test."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from kd_d2.config import get_cfg


@pytest.fixture(autouse=True)
def restored_catalogs():
    """Undo what a test registers."""
    datasets, metadata = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    DatasetCatalog.data.clear()
    DatasetCatalog.data.update(datasets)
    MetadataCatalog.data.clear()
    MetadataCatalog.data.update(metadata)


@pytest.fixture
def coco_folder(tmp_path):
    """A function that writes a data set in COCO's format and returns (json_file, image_root).

    ``images`` has one (width, height, boxes) per image, boxes being (category, x, y, w, h).
    """

    def write(images, categories=((1, "a"), (2, "b")), name="toy", **changes):
        folder = tmp_path / name
        (folder / "images").mkdir(parents=True)
        content = {
            "info": {},
            "categories": [{"id": id_, "name": class_} for id_, class_ in categories],
            "images": [],
            "annotations": [],
        }
        for i, (width, height, boxes) in enumerate(images):
            pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            file_name = f"{i}.png"
            Image.fromarray(pixels).save(folder / "images" / file_name)
            content["images"].append(
                {"id": i + 1, "file_name": file_name, "width": width, "height": height}
            )
            for category, *box in boxes:
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": i + 1,
                        "category_id": category,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        content.update(changes)
        json_file = folder / "instances.json"
        json_file.write_text(json.dumps(content))
        return str(json_file), str(folder / "images")

    return write


@pytest.fixture
def cfg():
    """The default config for small images on one process."""
    config = get_cfg()
    config.INPUT.MIN_SIZE_TRAIN = (32, 40, 48)
    config.INPUT.MIN_SIZE_TEST = 32
    config.SOLVER.IMS_PER_BATCH = 4
    config.DATALOADER.NUM_WORKERS = 0
    return config
