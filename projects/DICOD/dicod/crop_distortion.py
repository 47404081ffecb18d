"""Random geometric distortion of crops: CROP_CLASSIFIER.AFFINE and ELASTIC.

DICOD has none: COCO has 850,000 crops. A classifier of a small data set knows its objects by heart
without one, and is then no better a teacher than the annotations are.
"""

from typing import Optional, Sequence

from torch import Tensor
from torchvision.transforms import v2

__all__ = ["CropDistortion", "build_crop_distortion"]


class CropDistortion:
    """An affine map and an elastic deformation, drawn anew for every crop, by torchvision.

    What lies beyond the crop repeats its edge, so that no border of another colour gives the
    distortion away. Random numbers are torch's.
    """

    def __init__(
        self,
        *,
        size: int,
        degrees: float = 0.0,
        shear: float = 0.0,
        scale: Sequence[float] = (1.0, 1.0),
        translate: float = 0.0,
        alpha: float = 0.0,
        sigma: float = 5.0,
    ):
        """
        Args:
            size: side of the crops, pixels.
            degrees: rotation by up to so many degrees, to either side.
            shear: the same of a shear along x and y.
            scale: smallest and largest factor.
            translate: shift by up to this part of the side, along x and y.
            alpha: strength of the elastic deformation, pixels: the displacement is smoothed noise
                in [-1, 1] times this number; 0: none.
            sigma: standard deviation of the smoothing, pixels.

        Raises:
            ValueError: a value that cannot be.
        """
        _check(degrees, shear, scale, translate, alpha, sigma)
        border = max(2, size // 4)
        bilinear = v2.InterpolationMode.BILINEAR
        steps = [v2.Pad(border, padding_mode="edge")]
        if degrees or shear or translate or tuple(scale) != (1.0, 1.0):
            # relative to the padded side
            shift = translate * size / (size + 2 * border)
            steps.append(
                v2.RandomAffine(
                    degrees=degrees,
                    shear=(-shear, shear, -shear, shear),
                    scale=tuple(scale),
                    translate=(shift, shift),
                    interpolation=bilinear,
                )
            )
        if alpha:
            steps.append(v2.ElasticTransform(alpha=alpha, sigma=sigma, interpolation=bilinear))
        steps.append(v2.CenterCrop(size))
        self._steps = v2.Compose(steps)

    def __call__(self, crop: Tensor) -> Tensor:
        """(C, size, size) float32 -> the same, distorted."""
        return self._steps(crop)


def build_crop_distortion(cfg) -> Optional[CropDistortion]:
    """Return what CROP_CLASSIFIER.AFFINE and ELASTIC of a whole config ask for; None: nothing.

    Raises:
        ValueError: a value that cannot be; the message names the key.
    """
    node = cfg.CROP_CLASSIFIER
    values = {
        "degrees": node.AFFINE.DEGREES,
        "shear": node.AFFINE.SHEAR,
        "scale": tuple(node.AFFINE.SCALE),
        "translate": node.AFFINE.TRANSLATE,
        "alpha": node.ELASTIC.ALPHA,
        "sigma": node.ELASTIC.SIGMA,
    }
    _check(**values)
    neutral = {"scale": (1.0, 1.0), "sigma": values["sigma"]}
    if all(value == neutral.get(name, 0.0) for name, value in values.items()):
        return None
    return CropDistortion(size=node.INPUT_SIZE, **values)


def _check(degrees, shear, scale, translate, alpha, sigma) -> None:
    possible = {
        "AFFINE.DEGREES": 0 <= degrees <= 180,
        "AFFINE.SHEAR": 0 <= shear < 90,
        "AFFINE.SCALE": len(scale) == 2 and 0 < scale[0] <= scale[1],
        "AFFINE.TRANSLATE": 0 <= translate < 1,
        "ELASTIC.ALPHA": alpha >= 0,
        "ELASTIC.SIGMA": sigma > 0,
    }
    wrong = [f"CROP_CLASSIFIER.{key}" for key, fine in possible.items() if not fine]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: out of range; DEGREES is in 0..180, SHEAR in 0..90, SCALE two "
            "positive factors in order, TRANSLATE in 0..1, ALPHA 0 or more, SIGMA positive"
        )
