"""The embedded data set *digit-scenes*: handwritten digits on photographs, made on the spot.

The material ships with scikit-learn: 1,797 handwritten digits of 8x8 pixels and two photographs.
A scene is a darkened crop of a photograph on which digits of random sample, size, rotation and
colour are pasted one after the other; a later digit covers the earlier ones.

*Same bytes everywhere.* All arithmetic is on integers (fixed point, 16 fractional bits), random
numbers are the raw 64-bit words of numpy's PCG64 (whose stream numpy guarantees), PNG files are
written here with stored blocks, so that no compression library has a say. What remains is the
JPEG decoder that reads the two photographs; :data:`PHOTOGRAPH_HASHES` has what the usual one
(libjpeg-turbo) yields, and another result is logged.

*Splits.* Within each class the first 80 % of the samples (in scikit-learn's order, which follows
the writers) belong to train, the rest to val, whatever the seed. Likewise train crops come from
the left 70 % of each photograph and val crops from the rest. Nothing is shared.

*Boxes.* The visible pixels of a digit are those where its alpha is at least one half, which lie
inside the image and under no later digit. The box is the tight box around them, in COCO's XYWH
with whole numbers, ``area`` is its width times height. A digit that would hide more than
``max_occlusion`` of its own or of an earlier digit's pixels is moved, and left out when no
place is found; hence every digit in an image is annotated and ``iscrowd`` is always 0.

*Classes.* Names "0" to "9"; the category id in the JSON files is the digit plus one.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import struct
import tempfile
import time
import zlib
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

__all__ = [
    "CLASS_NAMES",
    "PHOTOGRAPH_HASHES",
    "DigitScenesParams",
    "DigitScenesPaths",
    "build_digit_scenes",
    "digit_scenes_paths",
    "render_scene",
    "split_digits",
]

logger = logging.getLogger(__name__)

CLASS_NAMES = tuple(str(digit) for digit in range(10))

# sha256 of the decoded pixels (427, 640, 3) of china.jpg and flower.jpg.
PHOTOGRAPH_HASHES = (
    "e701459344fd69797154c91add3bb5d70e5ed1a61d8bed889bab3a796104698d",
    "3202904ed246795bf616c66d7859cd7c6080eff736c6e38dc5cc62779742033f",
)

# Part of the name of the cache directory; raised whenever a scene would look different.
_VERSION = 1
_SPLITS = ("train", "val")
_ONE = 1 << 16  # 1.0 in fixed point
_PLACEMENT_ATTEMPTS = 20
_LOCK_TIMEOUT = 900.0  # seconds


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

    def key(self) -> str:
        """Name of the cache directory: 12 hex digits that depend on all parameters."""
        text = json.dumps([_VERSION, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


class DigitScenesPaths(NamedTuple):
    """Where the files of one set of parameters are."""

    directory: str
    train_images: str
    train_json: str
    val_images: str
    val_json: str
    manifest: str


def digit_scenes_paths(root: str, params: DigitScenesParams) -> DigitScenesPaths:
    """The paths below ``root`` (the folder of all data sets); touches no file."""
    directory = os.path.join(root, "digit_scenes", params.key())
    return DigitScenesPaths(
        directory=directory,
        train_images=os.path.join(directory, "train"),
        train_json=os.path.join(directory, "instances_train.json"),
        val_images=os.path.join(directory, "val"),
        val_json=os.path.join(directory, "instances_val.json"),
        manifest=os.path.join(directory, "manifest.json"),
    )


def build_digit_scenes(root: str, progress: bool = True, **params) -> DigitScenesPaths:
    """The paths of the files, which are generated if they are not there or not complete.

    The folder is filled under a temporary name and then renamed, so that a reader sees all or
    nothing. Of several processes one generates and the others wait for it.

    Args:
        root: folder of all data sets.
        progress: show a progress bar while generating.
        **params: see :class:`DigitScenesParams`.

    Raises:
        ValueError: if a parameter is not allowed.
        ImportError: if scikit-learn is not installed.
        OSError: if the folder cannot be written.
    """
    parameters = DigitScenesParams(**params)
    paths = digit_scenes_paths(root, parameters)
    if _is_complete(paths, parameters):
        return paths
    parent = os.path.dirname(paths.directory)
    os.makedirs(parent, exist_ok=True)
    with _lock(paths.directory + ".lock"):
        if not _is_complete(paths, parameters):
            temporary = tempfile.mkdtemp(prefix=f".{parameters.key()}.", dir=parent)
            try:
                _generate(temporary, parameters, progress)
                _replace(temporary, paths.directory)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return paths


def split_digits(targets: np.ndarray) -> Dict[str, List[np.ndarray]]:
    """Indices of the samples of each split and class.

    Args:
        targets: (samples,) the digit that each sample shows.

    Returns:
        for "train" and "val" ten arrays of indices: the first 80 % of a class (rounded down)
        and the rest.
    """
    split = {name: [] for name in _SPLITS}
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
        for name in _SPLITS
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
    draws = _Draws(params.seed, _SPLITS.index(split), index)
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


def _generate(directory: str, params: DigitScenesParams, progress: bool) -> None:
    from tqdm import tqdm

    counts = {"train": params.num_train, "val": params.num_val}
    material = load_material()
    digest = hashlib.sha256()
    start = time.perf_counter()
    with tqdm(
        total=sum(counts.values()), desc="digit-scenes", unit="img", disable=not progress
    ) as bar:
        for split in _SPLITS:
            os.mkdir(os.path.join(directory, split))
            images: List[Dict[str, Any]] = []
            annotations: List[Dict[str, Any]] = []
            for index in range(counts[split]):
                scene = render_scene(params, split, index, material[split])
                name = f"{index + 1:06d}.png"
                content = _encode_png(scene.image)
                digest.update(content)
                with open(os.path.join(directory, split, name), "wb") as file:
                    file.write(content)
                size = params.image_size
                images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
                for digit, box in zip(scene.digits, scene.boxes):
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": index + 1,
                            "category_id": digit.digit + 1,
                            "bbox": list(box),
                            "area": box[2] * box[3],
                            "iscrowd": 0,
                        }
                    )
                bar.update()
            text = _dump(
                {
                    "info": {"description": f"digit-scenes {split}"},
                    "categories": [
                        {"id": digit + 1, "name": name} for digit, name in enumerate(CLASS_NAMES)
                    ],
                    "images": images,
                    "annotations": annotations,
                }
            )
            digest.update(text)
            with open(os.path.join(directory, f"instances_{split}.json"), "wb") as file:
                file.write(text)
    manifest = {
        "version": _VERSION,
        "parameters": dataclasses.asdict(params),
        "sha256": digest.hexdigest(),
    }
    with open(os.path.join(directory, "manifest.json"), "wb") as file:
        file.write(_dump(manifest))
    seconds = time.perf_counter() - start
    logger.info(
        "Generated %d images of digit-scenes in %.1f s (sha256 %s).",
        sum(counts.values()),
        seconds,
        digest.hexdigest(),
    )


def _dump(content: Any) -> bytes:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return text.encode("ascii") + b"\n"


def _encode_png(image: np.ndarray) -> bytes:
    """A PNG file of an image (H, W, 3) uint8: no filter, deflate blocks stored uncompressed."""
    height, width = image.shape[:2]
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # first byte: filter type 0
    rows[:, 1:] = image.reshape(height, 3 * width)
    raw = rows.tobytes()
    stream = [b"\x78\x01"]
    for start in range(0, len(raw), 65535):
        block = raw[start : start + 65535]
        last = start + 65535 >= len(raw)
        stream.append(struct.pack("<BHH", last, len(block), 65535 - len(block)))
        stream.append(block)
    stream.append(struct.pack(">I", zlib.adler32(raw)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = [(b"IHDR", header), (b"IDAT", b"".join(stream)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _is_complete(paths: DigitScenesPaths, params: DigitScenesParams) -> bool:
    """Whether all files are there; image files all have the same, known size."""
    if not all(map(os.path.isfile, (paths.manifest, paths.train_json, paths.val_json))):
        return False
    expected = len(_encode_png(np.zeros((params.image_size, params.image_size, 3), np.uint8)))
    folders = ((paths.train_images, params.num_train), (paths.val_images, params.num_val))
    for folder, count in folders:
        if not os.path.isdir(folder):
            return False
        with os.scandir(folder) as entries:
            sizes = [entry.stat().st_size for entry in entries if entry.name.endswith(".png")]
        if len(sizes) != count or any(size != expected for size in sizes):
            return False
    return True


def _replace(temporary: str, directory: str) -> None:
    """Rename a finished folder to its final name, out of which an incomplete one is moved."""
    os.chmod(temporary, 0o755)
    if os.path.isdir(directory):
        stale = tempfile.mkdtemp(prefix=".stale.", dir=os.path.dirname(directory))
        with contextlib.suppress(FileNotFoundError):
            os.rename(directory, os.path.join(stale, "old"))
        shutil.rmtree(stale, ignore_errors=True)
    try:
        os.rename(temporary, directory)
    except OSError:
        # A process that did not share our lock (another machine) was faster; its bytes are ours.
        if not os.path.isdir(directory):
            raise


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Hold a lock among the processes of this machine; it ends with the process that holds it.

    Without it (no ``fcntl``, a file system without locks, 15 minutes of waiting) work may be done
    twice, but never wrongly, since finished folders are renamed into place.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        deadline = time.monotonic() + _LOCK_TIMEOUT
        waiting = False
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    logger.info("Another process generates digit-scenes; waiting for it.")
                    waiting = True
                time.sleep(0.1)
            except OSError:
                break
        yield
