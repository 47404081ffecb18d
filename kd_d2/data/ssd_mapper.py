"""Mapper of SSD: float images of one square size, and SSD's augmentation in training."""

import copy
import logging
from typing import Any, Dict, Sequence

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from .mappers import MAPPER_REGISTRY
from .photometric import PhotometricDistortion
from .ssd_augmentation import Expand, MinIoUCrop, centres_inside

__all__ = ["SSDMapper", "build_ssd_augmentation"]

logger = logging.getLogger(__name__)


@MAPPER_REGISTRY.register()
class SSDMapper:
    """Maps a dataset dict to an image of S x S float32 pixels and its boxes.

    In training: photometric distortion, expansion, crop; boxes whose centre the crop lost are
    dropped, the others clipped; then the stretch to S x S and the flip. Otherwise the stretch
    alone. Images are fp32 from the beginning and never antialiased, in training and test alike.
    Crowd boxes take part in the choice of the crop and are dropped at the end. No masks, no
    keypoints.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation],
        final_augmentations: Sequence[T.Augmentation],
        image_format: str,
    ):
        """
        Args:
            is_train: return boxes.
            augmentations: before boxes are dropped and clipped.
            final_augmentations: afterwards: stretch and flip.
            image_format: "RGB" or "BGR".
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.final_augmentations = T.AugmentationList(final_augmentations)
        self.image_format = image_format
        mode = "training" if is_train else "inference"
        logger.info(f"SSDMapper in {mode}: {[*augmentations, *final_augmentations]}")

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        size = cfg.MODEL.SSD.INPUT_SIZE
        final = [T.Resize((size, size))]
        if is_train and cfg.INPUT.RANDOM_FLIP != "none":
            vertical = cfg.INPUT.RANDOM_FLIP == "vertical"
            final.append(T.RandomFlip(horizontal=not vertical, vertical=vertical))
        return {
            "is_train": is_train,
            "augmentations": build_ssd_augmentation(cfg) if is_train else [],
            "final_augmentations": final,
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        """Return a new dict with "image" (3, S, S) float32 and, in training, "instances"."""
        dataset_dict = copy.deepcopy(dataset_dict)
        image = utils.read_image(dataset_dict["file_name"], format=self.image_format)
        utils.check_image_size(dataset_dict, image)
        annotations = dataset_dict.pop("annotations", None)
        boxes = [
            BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations or ()
        ]
        inputs = T.AugInput(
            image.astype(np.float32), boxes=np.asarray(boxes, np.float64).reshape(-1, 4)
        )
        self.augmentations(inputs)
        height, width = inputs.image.shape[:2]
        inside = centres_inside(inputs.boxes, (height, width))
        inputs.boxes = inputs.boxes.clip(min=0, max=[width, height, width, height])
        self.final_augmentations(inputs)

        image = np.ascontiguousarray(inputs.image.transpose(2, 0, 1))
        dataset_dict["image"] = torch.as_tensor(image)
        if self.is_train and annotations is not None:
            kept = [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": x["category_id"]}
                for x, box, stays in zip(annotations, inputs.boxes, inside)
                if stays and not x.get("iscrowd", 0)
            ]
            instances = utils.annotations_to_instances(kept, inputs.image.shape[:2])
            dataset_dict["instances"] = utils.filter_empty_instances(instances)
        return dataset_dict


def build_ssd_augmentation(cfg) -> list:
    """Return the augmentations before the stretch, as ``INPUT.SSD_AUG`` says."""
    node = cfg.INPUT.SSD_AUG
    result = []
    if node.PHOTOMETRIC:
        result.append(PhotometricDistortion(cfg.INPUT.FORMAT))
    if node.EXPAND_PROB > 0:
        result.append(Expand(cfg.MODEL.PIXEL_MEAN, node.EXPAND_RATIO, node.EXPAND_PROB))
    if node.CROP:
        result.append(MinIoUCrop())
    return result
