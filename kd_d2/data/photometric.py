"""Random changes of brightness, contrast, saturation, hue and the order of channels."""

from typing import Sequence, Tuple

import numpy as np
from detectron2.data import transforms as T

__all__ = ["PhotometricDistortion", "PhotometricTransform", "shift_hue_and_saturation"]


def shift_hue_and_saturation(
    image: np.ndarray, saturation: float, hue: float, channels: str = "RGB"
) -> np.ndarray:
    """The image with its saturation (HSV) multiplied and its hue turned; nothing is clipped.

    Args:
        image: float (H, W, 3), any range.
        saturation: factor.
        hue: degrees.
        channels: order of the three, "RGB" or "BGR".

    Returns:
        float (H, W, 3); (1, 0) and grey pixels give the input up to rounding.
    """
    order = [channels.index(c) for c in "RGB"]
    red, green, blue = (image[..., i] for i in order)
    value = image.max(axis=-1)
    chroma = value - image.min(axis=-1)
    divisor = np.where(chroma > 0, chroma, 1.0).astype(image.dtype)
    # in sixths of a turn; where two channels are largest, both formulas agree
    turn = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    result = np.empty_like(image)
    for i, start in zip(order, (5, 3, 1)):
        sixth = (turn + (start + hue / 60)) % 6
        share = np.clip(np.minimum(sixth, 4 - sixth), 0, 1)
        result[..., i] = value - saturation * chroma * share
    return result


class PhotometricTransform(T.Transform):
    """A fixed change of the pixel values; coordinates stay."""

    def __init__(
        self,
        *,
        brightness: float = 0.0,
        contrast: float = 1.0,
        contrast_first: bool = True,
        saturation: float = 1.0,
        hue: float = 0.0,
        order: Sequence[int] = (0, 1, 2),
        channels: str = "RGB",
    ):
        """
        Args:
            brightness: added to every value.
            contrast: factor of every value.
            contrast_first: before saturation and hue, else after them.
            saturation: factor of HSV's saturation.
            hue: added to HSV's hue, degrees.
            order: for each channel of the result the one it is taken from.
            channels: meaning of the channels of the input.
        """
        super().__init__()
        self._set_attributes({k: v for k, v in locals().items() if k != "self"})

    def apply_image(self, img: np.ndarray, interp: str = None) -> np.ndarray:
        """Return a new float32 (H, W, 3), not clipped to 0..255."""
        result = img.astype(np.float32) + np.float32(self.brightness)
        if self.contrast_first:
            result *= np.float32(self.contrast)
        if self.saturation != 1.0 or self.hue != 0.0:
            result = shift_hue_and_saturation(result, self.saturation, self.hue, self.channels)
        if not self.contrast_first:
            result *= np.float32(self.contrast)
        return result[..., list(self.order)]

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


class PhotometricDistortion(T.Augmentation):
    """SSD's photometric distortion: each of five changes with probability 1/2.

    In this order: brightness; contrast (here or after the next two, with probability 1/2);
    saturation; hue; a random permutation of the channels. Values are in 0..255 at the beginning and
    are not clipped. (Liu et al., ECCV 2016, after Howard, 2013; mmdetection's ranges.)
    """

    def __init__(
        self,
        channels: str = "RGB",
        brightness: float = 32.0,
        contrast: Tuple[float, float] = (0.5, 1.5),
        saturation: Tuple[float, float] = (0.5, 1.5),
        hue: float = 18.0,
    ):
        """
        Args:
            channels: order of the image's channels, "RGB" or "BGR".
            brightness: largest shift to either side.
            contrast, saturation: ranges of the factors.
            hue: largest shift to either side, degrees.
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> PhotometricTransform:
        def drawn(neutral, low, high):
            return np.random.uniform(low, high) if np.random.rand() < 0.5 else neutral

        return PhotometricTransform(
            brightness=drawn(0.0, -self.brightness, self.brightness),
            contrast=drawn(1.0, *self.contrast),
            contrast_first=bool(np.random.rand() < 0.5),
            saturation=drawn(1.0, *self.saturation),
            hue=drawn(0.0, -self.hue, self.hue),
            order=tuple(np.random.permutation(3)) if np.random.rand() < 0.5 else (0, 1, 2),
            channels=self.channels,
        )
