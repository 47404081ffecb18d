"""Data sets and classifiers that the tests of crops share."""

import contextlib
import json
from uuid import uuid4

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from kd_d2.engine.main import build_config
from kd_d2.projects.dicod.classifier import CropClassifier
from kd_d2.projects.dicod.image_classifier import ClassLosses

MEAN = [123.675, 116.28, 103.53]
STD = [58.395, 57.12, 57.375]
CLASSES = ["disc", "square", "cross"]
# ResNet-50 with an eighth of the channels
NARROW = {
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
LOSS_OPTIONS = ("focal_alpha", "focal_gamma", "focal_weight", "prior_prob")


def annotation(bbox, category_id=1, **changes):
    x, y, w, h = bbox
    facts = {"image_id": 1, "category_id": category_id, "bbox": list(bbox), "area": w * h}
    return {**facts, "iscrowd": 0, **changes}


@contextlib.contextmanager
def coco_dataset(folder, annotations, classes=CLASSES, sizes=((90, 120),), seed=0):
    """Register images of noise with given annotations; yields the name.

    Args:
        sizes: (height, width) of the images 1, 2, ...; category i + 1 is class i.
    """
    name = f"crops_{uuid4().hex[:12]}"
    folder = folder / name
    folder.mkdir()
    noise = np.random.default_rng(seed)
    images = []
    for i, (height, width) in enumerate(sizes):
        pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        facts = {"id": i + 1, "file_name": f"{i}.png", "height": height, "width": width}
        images.append(facts)
    content = {
        "images": images,
        "annotations": [{"id": i + 1, **a} for i, a in enumerate(annotations)],
        "categories": [{"id": i + 1, "name": label} for i, label in enumerate(classes)],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    register_coco_instances(name, {}, str(folder / "instances.json"), str(folder))
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def classifier_cfg(folder, name, **changes):
    """Config of a small classifier of the crops of ``name``; frozen."""
    values = {
        "DATASETS.TRAIN": (name,),
        "DATASETS.TEST": (name,),
        "DATALOADER.NUM_WORKERS": 0,
        "MODEL.DEVICE": "cpu",
        "MODEL.PIXEL_MEAN": MEAN,
        "MODEL.PIXEL_STD": STD,
        "INPUT.FORMAT": "RGB",
        "INPUT.RANDOM_FLIP": "horizontal",
        "CROP_CLASSIFIER.ARCH": "resnet18",
        "CROP_CLASSIFIER.INPUT_SIZE": 32,
        "CROP_CLASSIFIER.LOSSES": ("cross_entropy", "focal"),
        "CROP_CLASSIFIER.INDEX_DIR": str(folder / "index"),
        "CROP_CLASSIFIER.BATCH_SIZE": 4,
        "SEED": 3,
        "OUTPUT_DIR": str(folder / "output"),
        **changes,
    }
    return build_config("", [part for item in values.items() for part in item])


def small_classifier(losses=("cross_entropy",), **changes):
    """A ResNet-18 of CLASSES; ``changes`` are arguments of it or, but ``names``, of its losses."""
    options = {key: changes.pop(key) for key in LOSS_OPTIONS if key in changes}
    arguments = {
        "arch": "resnet18",
        "classes": CLASSES,
        "pixel_mean": MEAN,
        "pixel_std": STD,
        "image_format": "RGB",
        "input_size": 32,
        "losses": ClassLosses(names=losses, **options),
        **changes,
    }
    return CropClassifier(**arguments)


def class_folder(folder, num_images, classes=("blue", "green", "red")):
    """Write ``train`` and ``val`` with noisy images of a colour for each class; return the folder.

    The named colour is by far the brightest channel; an unknown name is all dark. Every class has
    one image more in ``val``.
    """
    channels = {"red": 0, "green": 1, "blue": 2}
    noise = np.random.default_rng(0)
    folder = folder / uuid4().hex[:12]
    for split in ("train", "val"):
        for label in classes:
            (folder / split / label).mkdir(parents=True)
            for i in range(num_images + (split == "val")):
                pixels = noise.integers(0, 100, (40 + i, 48, 3), dtype=np.uint8)
                if label in channels:
                    pixels[..., channels[label]] += 120
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    return folder


def folder_cfg(images, folder, **changes):
    """Config of a NARROW backbone as a classifier of ``class_folder``'s images; frozen."""
    values = {
        "DATALOADER.NUM_WORKERS": 0,
        "MODEL.DEVICE": "cpu",
        "MODEL.PIXEL_MEAN": MEAN,
        "MODEL.PIXEL_STD": STD,
        "MODEL.RESNETS.NORM": "BN",
        **NARROW,
        "INPUT.FORMAT": "RGB",
        "CROP_CLASSIFIER.MODE": "folder",
        "CROP_CLASSIFIER.ARCH": "backbone",
        "CROP_CLASSIFIER.FOLDER.TRAIN": str(images / "train"),
        "CROP_CLASSIFIER.FOLDER.TEST": str(images / "val"),
        "CROP_CLASSIFIER.INPUT_SIZE": 32,
        "CROP_CLASSIFIER.BATCH_SIZE": 6,
        "SEED": 3,
        "OUTPUT_DIR": str(folder / "output"),
        **changes,
    }
    return build_config("", [part for item in values.items() for part in item])
