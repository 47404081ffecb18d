"""SSD's geometric augmentations: expansion to a larger canvas and a crop that keeps objects."""

from typing import Sequence, Tuple

import numpy as np
from detectron2.data import transforms as T

__all__ = ["Expand", "ExpandTransform", "MinIoUCrop", "centres_inside", "patch_ious"]


class ExpandTransform(T.Transform):
    """Puts the image on a larger canvas of one colour."""

    def __init__(self, left: int, top: int, width: int, height: int, fill: Sequence[float]):
        """
        Args:
            left, top: position of the image's upper left corner on the canvas, pixels.
            width, height: of the canvas, at least those of the image plus the position.
            fill: colour, in the order of the image's channels.
        """
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: str = None) -> np.ndarray:
        """(height, width, C) of the type of ``img``."""
        canvas = np.empty((self.height, self.width, img.shape[2]), img.dtype)
        canvas[...] = np.asarray(self.fill, img.dtype)
        canvas[self.top : self.top + img.shape[0], self.left : self.left + img.shape[1]] = img
        return canvas

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords + np.asarray([self.left, self.top], coords.dtype)


class Expand(T.Augmentation):
    """With a probability, the image anywhere on a canvas of 1 to ``max_ratio`` times its sides."""

    def __init__(self, fill: Sequence[float], max_ratio: float = 4.0, prob: float = 0.5):
        """
        Args:
            fill: colour of the canvas, in the order of the image's channels.
            max_ratio: at least 1.
            prob: probability of an expansion.

        Raises:
            ValueError: a value out of range.
        """
        super().__init__()
        if max_ratio < 1 or not 0 <= prob <= 1:
            raise ValueError(
                "INPUT.SSD_AUG.EXPAND_RATIO must be at least 1 and EXPAND_PROB in [0, 1], got "
                f"{max_ratio} and {prob}"
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> T.Transform:
        if np.random.rand() >= self.prob:
            return T.NoOpTransform()
        height, width = image.shape[:2]
        ratio = np.random.uniform(1, self.max_ratio)
        left = int(np.random.uniform(0, width * ratio - width))
        top = int(np.random.uniform(0, height * ratio - height))
        return ExpandTransform(left, top, int(width * ratio), int(height * ratio), self.fill)


class MinIoUCrop(T.Augmentation):
    """SSD's crop: a patch that overlaps *every* box by a random least IoU.

    A mode is drawn among: the whole image, each of ``min_ious``, and no least IoU. But for the
    first, up to ``tries`` patches are drawn whose sides are a part of the image's of at least
    ``min_scale`` and whose height/width is within ``ratios``; the first is taken in which the
    centre of a box lies and whose IoU with every box, crowd boxes included, reaches the least one.
    If there is none, another mode is drawn. Boxes are not clipped and none is dropped here:
    see :func:`centres_inside`.
    """

    def __init__(
        self,
        min_ious: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        min_scale: float = 0.3,
        ratios: Tuple[float, float] = (0.5, 2.0),
        tries: int = 50,
    ):
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray, boxes: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        modes = (None, *self.min_ious, 0.0)
        while True:
            least = modes[np.random.randint(len(modes))]
            if least is None:
                return T.NoOpTransform()
            for _ in range(self.tries):
                patch = self._patch(height, width)
                if patch is not None and _fits(patch, boxes, least):
                    x, y, right, bottom = patch
                    return T.CropTransform(x, y, right - x, bottom - y, width, height)

    def _patch(self, height: int, width: int):
        """Integer (x1, y1, x2, y2), or None if the shape drawn is not allowed."""
        w = np.random.uniform(self.min_scale * width, width)
        h = np.random.uniform(self.min_scale * height, height)
        if not self.ratios[0] <= h / w <= self.ratios[1]:
            return None
        x, y = np.random.uniform(0, width - w), np.random.uniform(0, height - h)
        patch = int(x), int(y), int(x + w), int(y + h)
        return patch if patch[2] > patch[0] and patch[3] > patch[1] else None


def _fits(patch: Tuple[int, int, int, int], boxes: np.ndarray, least: float) -> bool:
    if not len(boxes):
        return True
    x, y, right, bottom = patch
    inside = centres_inside(boxes - np.asarray([x, y, x, y]), (bottom - y, right - x))
    return bool(inside.any() and patch_ious(patch, boxes).min() >= least)


def patch_ious(patch: Sequence[float], boxes: np.ndarray) -> np.ndarray:
    """(M,) IoUs of a patch (x1, y1, x2, y2) with ``boxes`` (M, 4), sides in continuous pixels."""
    patch = np.asarray(patch, np.float64)
    sides = np.minimum(patch[2:], boxes[:, 2:]) - np.maximum(patch[:2], boxes[:, :2])
    overlap = sides.clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return overlap / (areas + (patch[2:] - patch[:2]).prod() - overlap)


def centres_inside(boxes: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """bool (M,): the centre of the box is strictly inside an image of ``size`` (height, width)."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centres > 0) & (centres < np.asarray(size[::-1]))).all(axis=1)
