"""Crops as image files: optional, for when reading whole images for single objects is too slow.

A file holds the pixels around one box, one pixel more on every side and no resampling, so that the
crop made from it equals the one made from the image.
"""

import json
import math
import os
from typing import Sequence, Tuple

import numpy as np
from detectron2.data import detection_utils as utils
from PIL import Image
from tqdm import tqdm

from kd_d2.checkpoint import atomic_write

from .crop_index import CropIndex

__all__ = ["check_crop_files", "patch_bounds", "patch_file", "write_crop_files"]

_DONE = "complete.json"


def patch_bounds(box: Sequence[float], width: int, height: int) -> Tuple[int, int, int, int]:
    """The pixels that bilinear sampling inside of ``box`` can read: (x0, y0, x1, y1).

    Args:
        box: XYXY, absolute pixels; may reach over the border.
        width, height: of the image, which bounds the result.
    """
    x1, y1, x2, y2 = box
    return (
        min(max(math.floor(x1) - 1, 0), width - 1),
        min(max(math.floor(y1) - 1, 0), height - 1),
        max(min(math.ceil(x2) + 1, width), 1),
        max(min(math.ceil(y2) + 1, height), 1),
    )


def patch_file(folder: str, name: str, i: int) -> str:
    """Path of the file of crop ``i`` of the data set ``name``; 10000 files a folder."""
    return os.path.join(folder, name, f"{i // 10000:04d}", f"{i:08d}.png")


def write_crop_files(index: CropIndex, folder: str, progress: bool = True) -> str:
    """Write every crop of ``index`` as PNG (lossless, RGB) and return their folder.

    A last file, written when all others are there, says which index they belong to.

    Raises:
        OSError: an image cannot be read, or the folder cannot be written.
        ValueError: an image has another size than annotated.
    """
    target = os.path.join(folder, index.name)
    loaded, image = -1, None
    for i in tqdm(range(len(index)), f"writing {target}", disable=not progress, unit="crop"):
        record = index.record(i)
        if index.image_index[i] != loaded:
            loaded = index.image_index[i]
            image = utils.read_image(record["file_name"], format="RGB")
            utils.check_image_size(dict(record), image)
        x0, y0, x1, y1 = patch_bounds(record["box"], record["width"], record["height"])
        path = patch_file(folder, index.name, i)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image[y0:y1, x0:x1])).save(path)
    os.makedirs(target, exist_ok=True)
    with atomic_write(os.path.join(target, _DONE)) as file:
        file.write(json.dumps({"fingerprint": index.fingerprint}).encode())
    return target


def check_crop_files(index: CropIndex, folder: str) -> None:
    """Check that ``folder`` holds all crops of exactly this index.

    Raises:
        ValueError: it does not.
    """
    path = os.path.join(folder, index.name, _DONE)
    try:
        with open(path) as file:
            fingerprint = json.load(file)["fingerprint"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"CROP_CLASSIFIER.CROPS_DIR is {folder}, which does not hold all crops of "
            f"{index.name} ({error}); write them with tools/crop_index.py --write-crops, or leave "
            "the key empty."
        ) from error
    if fingerprint != index.fingerprint:
        raise ValueError(
            f"The crops of {index.name} in CROP_CLASSIFIER.CROPS_DIR ({folder}) were made from "
            "other annotations; write them again with tools/crop_index.py --write-crops."
        )
