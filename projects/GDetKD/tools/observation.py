"""What the commands in this folder have in common."""

import json
import os
from typing import Any, Dict, Iterable, List

import numpy as np
from detectron2.data import build_detection_test_loader
from detectron2.utils.env import seed_all_rng
from tqdm import tqdm

from kd_d2.data import annotated_images
from kd_d2.projects.gdetkd.analysis.observer import RoIObserver

__all__ = ["gather", "images_of", "seed", "write"]


def seed(cfg) -> None:
    """Sampling is random: the same RoIs in every call."""
    seed_all_rng(max(cfg.SEED, 0))


def images_of(cfg, dataset: str, args) -> Iterable[List[Dict[str, Any]]]:
    """Batches of one image of the options --images or --num-images, with ground truth."""
    images = annotated_images(cfg, dataset, args.images, args.num_images)
    return build_detection_test_loader(images, mapper=None, num_workers=cfg.DATALOADER.NUM_WORKERS)


def gather(observer: RoIObserver, batches, title: str) -> Dict[str, np.ndarray]:
    """Arrays of all batches by name, and ``image``, the index of each row's image.

    Raises:
        ValueError: not one RoI in all images.
    """
    parts: Dict[str, List[np.ndarray]] = {}
    for batch in tqdm(batches, desc=title, unit="image"):
        values = observer(batch)
        rows = len(next(iter(values.values())))
        values["image"] = np.full(rows, batch[0]["index"])
        for name, value in values.items():
            parts.setdefault(name, []).append(value)
    result = {name: np.concatenate(values) for name, values in parts.items()}
    if not len(result["image"]):
        raise ValueError("the student has no foreground RoI in these images; take more, or others")
    return result


def write(folder: str, name: str, facts: Dict[str, Any], arrays: Dict[str, np.ndarray]) -> None:
    """Write <name>.json and <name>.npz."""
    with open(os.path.join(folder, f"{name}.json"), "w") as f:
        json.dump(facts, f, indent=2)
    np.savez_compressed(os.path.join(folder, f"{name}.npz"), **arrays)
