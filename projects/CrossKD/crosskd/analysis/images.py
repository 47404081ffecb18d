"""Test images with their ground truth, as the network sees them."""

from typing import Any, Dict, List, Sequence

import numpy as np

from kd_d2.data import annotated_images

__all__ = ["load_images", "rgb_picture"]


def load_images(cfg, dataset: str, listed: str = "", count: int = 1) -> List[Dict[str, Any]]:
    """Records of :func:`kd_d2.data.annotated_images`, all of them read."""
    return list(annotated_images(cfg, dataset, listed, count))


def rgb_picture(record: Dict[str, Any], input_format: str) -> np.ndarray:
    """The image of a record as (H, W, 3) uint8 RGB.

    Raises:
        ValueError: INPUT.FORMAT is neither "RGB" nor "BGR".
    """
    orders: Dict[str, Sequence[int]] = {"RGB": (0, 1, 2), "BGR": (2, 1, 0)}
    if input_format not in orders:
        raise ValueError(f"pictures need INPUT.FORMAT 'RGB' or 'BGR', got '{input_format}'")
    channels = record["image"][list(orders[input_format])]
    return np.ascontiguousarray(channels.permute(1, 2, 0).numpy().astype(np.uint8))
