"""Loaders of images with one label each: Detectron2's, and a training stream that resumes."""

from typing import Any, Callable, Dict, Sequence

import torch
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import Dataset

from kd_d2.data import NamingMapper, ResumableTrainLoader, RobustDataset

__all__ = ["build_record_test_loader", "build_record_train_loader", "crops_per_process"]


def build_record_test_loader(cfg, records: Dataset, mapper: Callable[[Dict[str, Any]], Any]):
    """Return a loader of all records, each once; with several processes each has its part.

    Args:
        cfg: whole config.
        records: dicts with "file_name".
        mapper: record -> dict with "crop" and "label".
    """
    return build_detection_test_loader(
        records,
        mapper=NamingMapper(mapper),
        batch_size=crops_per_process(cfg),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_collate,
    )


def build_record_train_loader(
    cfg, records: Dataset, mapper: Callable[[Dict[str, Any]], Any]
) -> ResumableTrainLoader:
    """Return the endless, shuffled loader of training batches of ``records``.

    Args:
        cfg: whole config.
        records: dicts with "file_name".
        mapper: record -> dict with "crop" and "label".

    Raises:
        ValueError: CROP_CLASSIFIER.BATCH_SIZE cannot be shared by the processes.
    """
    node = cfg.CROP_CLASSIFIER
    batch = crops_per_process(cfg)
    dataset = RobustDataset(
        records,
        mapper,
        bad_image=cfg.DATALOADER.BAD_IMAGE,
        max_bad_fraction=cfg.DATALOADER.MAX_BAD_FRACTION,
    )

    def build(sampler):
        return build_detection_train_loader(
            dataset,
            mapper=None,
            sampler=sampler,
            total_batch_size=node.BATCH_SIZE,
            aspect_ratio_grouping=False,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=_collate,
        )

    return ResumableTrainLoader(
        build, TrainingSampler(len(dataset)), images_per_batch=batch, num_images=len(dataset)
    )


def crops_per_process(cfg) -> int:
    """This process' share of CROP_CLASSIFIER.BATCH_SIZE.

    Raises:
        ValueError: it is not a whole number.
    """
    total, world = cfg.CROP_CLASSIFIER.BATCH_SIZE, comm.get_world_size()
    if total < 1 or total % world:
        raise ValueError(
            f"CROP_CLASSIFIER.BATCH_SIZE is {total}, which is not a positive multiple of the "
            f"{world} processes."
        )
    return total // world


def _collate(samples: Sequence[Dict[str, Any]]) -> Dict[str, Tensor]:
    return {
        "crops": torch.stack([sample["crop"] for sample in samples]),
        "labels": torch.tensor([sample["label"] for sample in samples]),
    }
