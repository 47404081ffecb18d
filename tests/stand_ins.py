"""Small things in the place of large ones, for commands that are tested as they are printed."""

import json
import pathlib

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

__all__ = ["write_coco"]


def write_coco(folder: str, num_train: int = 4, num_val: int = 2) -> None:
    """Write images of noise and boxes with the layout, the classes and the ids of COCO 2017.

    Args:
        folder: ``coco`` in the folder of the data sets; must not exist.
    """
    root = pathlib.Path(folder)
    (root / "annotations").mkdir(parents=True)
    things = [category for category in COCO_CATEGORIES if category["isthing"]]
    categories = [{"id": thing["id"], "name": thing["name"]} for thing in things]
    rng = np.random.default_rng(0)
    for split, count in (("train2017", num_train), ("val2017", num_val)):
        (root / split).mkdir()
        images, annotations = [], []
        for image_id in range(1, count + 1):
            height, width = 60, 80
            name = f"{image_id:012d}.jpg"
            noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / split / name)
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for _ in range(3):
                x, y = (int(v) for v in rng.integers(0, 25, 2))
                w, h = (int(v) for v in rng.integers(20, 35, 2))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": int(rng.choice([thing["id"] for thing in things])),
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                    }
                )
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
