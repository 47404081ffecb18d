"""Scenes of handwritten digits on photographs, drawn with whole numbers only.

All arithmetic is on integers (fixed point, 16 fractional bits) and random numbers are the raw
64-bit words of numpy's PCG64, whose stream numpy guarantees: a scene has the same pixels on every
machine. What remains is the JPEG decoder that reads the two photographs;
:data:`PHOTOGRAPH_HASHES` has what the usual one (libjpeg-turbo) yields, and another result is
logged. Files are written in :mod:`.digit_scenes`.
"""

import dataclasses
import hashlib
import logging
import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

__all__ = [
    "PHOTOGRAPH_HASHES",
    "SPLITS",
    "DigitScenesParams",
    "Material",
    "PastedDigit",
    "Scene",
    "load_material",
    "render_scene",
    "split_digits",
]

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")

# sha256 of the decoded pixels (427, 640, 3) of china.jpg and flower.jpg.
PHOTOGRAPH_HASHES = (
    "e701459344fd69797154c91add3bb5d70e5ed1a61d8bed889bab3a796104698d",
    "3202904ed246795bf616c66d7859cd7c6080eff736c6e38dc5cc62779742033f",
)

_ONE = 1 << 16  # 1.0 in fixed point
_PLACEMENT_ATTEMPTS = 20


@dataclasses.dataclass(frozen=True)
class DigitScenesParams:
    """What determines the scenes, all whole numbers.

    Attributes:
        num_train, num_val: number of images of the two splits.
        image_size: side of the square images, pixels.
        digit_size: smallest and largest side of the square that a sample fills, pixels. The
            box of the digit itself is about as high and narrower.
        digits_per_image: fewest and most digits tried per image.
        rotation: largest rotation to either side, degrees.
        max_occlusion: largest hidden part of a digit, percent of its pixels.
        brightness: range of the brightest channel of a digit, 0 to 255.
        saturation: range of the distance between brightest and darkest channel, percent of the
            former; 0 is grey.
        background: range of the factor that darkens the photographs, percent.
        seed: another number gives other scenes (but the same split of the digits).

    Raises:
        ValueError: if a value is not allowed, naming the key.
    """

    num_train: int = 1500
    num_val: int = 300
    image_size: int = 128
    digit_size: Tuple[int, int] = (20, 64)
    digits_per_image: Tuple[int, int] = (1, 6)
    rotation: int = 20
    max_occlusion: int = 20
    brightness: Tuple[int, int] = (170, 255)
    saturation: Tuple[int, int] = (0, 60)
    background: Tuple[int, int] = (15, 50)
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                if len(value) != 2:
                    self._refuse(field.name, "has to be two numbers (smallest, largest)")
                value = tuple(self._whole(field.name, v) for v in value)
                if value[0] > value[1]:
                    self._refuse(field.name, "has its smallest value above its largest")
            else:
                value = self._whole(field.name, value)
            object.__setattr__(self, field.name, value)
        limits = {
            "num_train": (1, 10**7),
            "num_val": (1, 10**7),
            "image_size": (16, 4096),
            "digit_size": (8, self.image_size),
            "digits_per_image": (0, 100),
            "rotation": (0, 180),
            "max_occlusion": (0, 99),
            "brightness": (0, 255),
            "saturation": (0, 100),
            "background": (0, 100),
            "seed": (0, 2**31 - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if min(values) < low or max(values) > high:
                self._refuse(name, f"has to lie between {low} and {high}")

    def _whole(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or int(value) != value:
            self._refuse(name, "has to be a whole number")
        return int(value)

    def _refuse(self, name: str, why: str) -> None:
        raise ValueError(f"DATASETS.DIGIT_SCENES.{name.upper()} = {getattr(self, name)} {why}.")

    @classmethod
    def from_config(cls, cfg) -> "DigitScenesParams":
        """The parameters of the node ``cfg.DATASETS.DIGIT_SCENES``."""
        node = cfg.DATASETS.DIGIT_SCENES
        return cls(**{f.name: getattr(node, f.name.upper()) for f in dataclasses.fields(cls)})


def split_digits(targets: np.ndarray) -> Dict[str, List[np.ndarray]]:
    """Indices of the samples of each split and class.

    Args:
        targets: (samples,) the digit that each sample shows.

    Returns:
        for "train" and "val" ten arrays of indices: the first 80 % of a class (rounded down)
        and the rest.
    """
    split = {name: [] for name in SPLITS}
    for digit in range(10):
        indices = np.flatnonzero(targets == digit)
        end = len(indices) * 4 // 5
        split["train"].append(indices[:end])
        split["val"].append(indices[end:])
    return split


class Material(NamedTuple):
    """What scenes are made from, for one split."""

    digits: List[np.ndarray]  # per class (samples, 8, 8), int64, 0 to 16
    photographs: List[np.ndarray]  # (H, W, 3), int64, 0 to 255


def load_material() -> Dict[str, Material]:
    """Digits and photographs of each split, from the files of scikit-learn."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise ImportError(
            "The data set digit-scenes is made from images that ship with scikit-learn, which is "
            "not installed; install it with `pip install scikit-learn`."
        ) from error
    digits = load_digits()
    photographs = [np.ascontiguousarray(image) for image in load_sample_images().images]
    hashes = tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in photographs)
    if hashes != PHOTOGRAPH_HASHES:
        logger.warning(
            "The JPEG decoder of this installation yields other pixels for scikit-learn's "
            "photographs than the usual one: the backgrounds of digit-scenes differ slightly "
            "from those of other machines, digits and boxes do not."
        )
    samples = digits.images.astype(np.int64)
    split = split_digits(digits.target)
    border = photographs[0].shape[1] * 7 // 10
    parts = {"train": slice(None, border), "val": slice(border, None)}
    return {
        name: Material(
            digits=[samples[indices] for indices in split[name]],
            photographs=[image[:, parts[name]].astype(np.int64) for image in photographs],
        )
        for name in SPLITS
    }


class _Draws:
    """Whole random numbers from the raw words of PCG64, seeded with a list of numbers."""

    def __init__(self, *seed: int):
        self._words = np.random.PCG64(np.random.SeedSequence(seed))

    def between(self, low: int, high: int) -> int:
        """Uniform in low..high, both included (bias below 2^-50)."""
        return low + ((int(self._words.random_raw()) * (high - low + 1)) >> 64)


class PastedDigit(NamedTuple):
    """One digit of a scene."""

    digit: int  # 0 to 9
    alpha: np.ndarray  # (S, S), int64, 0 to 255: the digit before anything hides it
    left: int  # column of the image where alpha begins; may be negative
    top: int  # row of the image where alpha begins; may be negative


class Scene(NamedTuple):
    """One image with its digits, the hindmost first."""

    image: np.ndarray  # (S, S, 3), uint8, RGB
    digits: List[PastedDigit]
    boxes: List[Tuple[int, int, int, int]]  # XYWH, pixels


def render_scene(params: DigitScenesParams, split: str, index: int, material: Material) -> Scene:
    """Scene ``index`` (0-based) of a split; depends on neither the other scenes nor the counts."""
    draws = _Draws(params.seed, SPLITS.index(split), index)
    size = params.image_size
    image = _background(draws, params, material.photographs)
    owner = np.zeros((size, size), dtype=np.int64)  # 0: photograph, i: the i-th digit
    totals: List[int] = []  # pixels of each digit, whether visible or not
    digits: List[PastedDigit] = []
    for _ in range(draws.between(*params.digits_per_image)):
        digit = draws.between(0, 9)
        samples = material.digits[digit]
        sample = samples[draws.between(0, len(samples) - 1)]
        side = draws.between(*params.digit_size)
        alpha = _draw_digit(sample, side, draws.between(-params.rotation, params.rotation))
        colour = _colour(draws, params)
        placed = _place(draws, params, alpha, owner, totals)
        if placed is None:
            continue
        left, top = placed
        totals.append(int((alpha >= 128).sum()))
        inside, covered = _overlap(alpha, left, top, size)
        weight = covered[:, :, None]
        image[inside] = (image[inside] * (255 - weight) + colour * weight + 127) // 255
        owner[inside][covered >= 128] = len(totals)
        digits.append(PastedDigit(digit, alpha, left, top))
    boxes = [_tight_box(owner == number + 1) for number in range(len(digits))]
    return Scene(image.astype(np.uint8), digits, boxes)


def _background(draws, params, photographs) -> np.ndarray:
    """(S, S, 3) a darkened square window of a photograph, resized and perhaps mirrored."""
    photograph = photographs[draws.between(0, len(photographs) - 1)]
    height, width = photograph.shape[:2]
    side = draws.between(96, min(192, height, width))
    top, left = draws.between(0, height - side), draws.between(0, width - side)
    window = photograph[top : top + side, left : left + side]
    if draws.between(0, 1):
        window = window[:, ::-1]
    # Bilinear, rows first; pixel centres of the image mapped to those of the window.
    steps = np.arange(params.image_size, dtype=np.int64)
    position = (2 * steps + 1) * side * (_ONE // 2) // params.image_size - _ONE // 2
    position = np.clip(position, 0, (side - 1) * _ONE)
    first, weight = position >> 16, position & (_ONE - 1)
    second = np.minimum(first + 1, side - 1)
    rows = window[first] * (_ONE - weight)[:, None, None] + window[second] * weight[:, None, None]
    rows >>= 8  # values times 2^8
    weight = weight[None, :, None]
    resized = rows[:, first] * (_ONE - weight) + rows[:, second] * weight  # values times 2^24
    gain = draws.between(*params.background)
    return (resized * gain // 100) >> 24


def _draw_digit(sample: np.ndarray, side: int, degrees: int) -> np.ndarray:
    """(S, S) alpha, 0 to 255, of a sample (8, 8) scaled to ``side`` pixels and rotated.

    The sample is interpolated bilinearly and its values 4.5 to 9.5 (of 16) are stretched to
    0 to 255, which makes the edges of large digits about as sharp as those of small ones.
    """
    cosine = round(math.cos(math.radians(degrees)) * (1 << 14))
    sine = round(math.sin(math.radians(degrees)) * (1 << 14))
    raster = (side * (abs(cosine) + abs(sine)) >> 14) + 2
    twice = 2 * np.arange(raster, dtype=np.int64) - (raster - 1)  # distance from the centre, x 2
    x, y = twice[None, :], twice[:, None]
    padded = np.zeros((12, 12), dtype=np.int64)
    padded[2:10, 2:10] = sample
    centre = 11 * _ONE // 2
    # (2x cos) * (8 / side) / 2, in fixed point: 2^16 * 8 / (2 * 2^14) = 16.
    u = np.clip((cosine * x + sine * y) * 16 // side + centre, 0, 11 * _ONE - 1)
    v = np.clip((cosine * y - sine * x) * 16 // side + centre, 0, 11 * _ONE - 1)
    column, row = u >> 16, v >> 16
    u, v = (u & (_ONE - 1)) >> 4, (v & (_ONE - 1)) >> 4  # 12 bits each
    flat = padded.ravel()
    corner = row * 12 + column
    value = (
        (flat[corner] * (4096 - u) + flat[corner + 1] * u) * (4096 - v)
        + (flat[corner + 12] * (4096 - u) + flat[corner + 13] * u) * v
    ) >> 12  # values times 2^12
    return np.clip((value - (9 << 11)) * 255 // (5 << 12), 0, 255)


def _colour(draws, params) -> np.ndarray:
    """(3,) a colour: brightest channel, darkest channel and a third between, in any order."""
    brightest = draws.between(*params.brightness)
    darkest = brightest * (100 - draws.between(*params.saturation)) // 100
    channels = [brightest, darkest, draws.between(darkest, brightest)]
    for last in (2, 1):
        other = draws.between(0, last)
        channels[last], channels[other] = channels[other], channels[last]
    return np.array(channels, dtype=np.int64)


def _overlap(alpha, left, top, size):
    """The part of the image under a digit (two slices), and the part of alpha inside the image."""
    rows = slice(max(top, 0), min(top + alpha.shape[0], size))
    columns = slice(max(left, 0), min(left + alpha.shape[1], size))
    cut = alpha[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return (rows, columns), cut


def _place(draws, params, alpha, owner, totals) -> Optional[Tuple[int, int]]:
    """Left and top of a place where no digit gets hidden too much, or None after 20 attempts."""
    size = params.image_size
    margin = alpha.shape[0] // 8  # a digit may stick out of the image by this much
    total = int((alpha >= 128).sum())
    if total == 0:
        return None
    needed = 100 - params.max_occlusion
    visible = np.bincount(owner.ravel(), minlength=len(totals) + 1)[1:]
    for _ in range(_PLACEMENT_ATTEMPTS):
        highest = max(size - alpha.shape[0] + margin, -margin)
        left, top = draws.between(-margin, highest), draws.between(-margin, highest)
        inside, covered = _overlap(alpha, left, top, size)
        mask = covered >= 128
        if int(mask.sum()) * 100 < needed * total:
            continue
        hidden = np.bincount(owner[inside][mask], minlength=len(totals) + 1)[1:]
        left_over = visible - hidden
        if all(n * 100 >= needed * t for n, t in zip(left_over.tolist(), totals)):
            return left, top
    return None


def _tight_box(mask: np.ndarray) -> Tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1
