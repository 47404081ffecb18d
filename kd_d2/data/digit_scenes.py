"""The embedded data set *digit-scenes*: handwritten digits on photographs, made on the spot.

The material ships with scikit-learn: 1,797 handwritten digits of 8x8 pixels and two photographs.
A scene is a darkened crop of a photograph on which digits of random sample, size, rotation and
colour are pasted one after the other; a later digit covers the earlier ones.

*Same bytes everywhere.* Scenes are drawn with whole numbers only (:mod:`.scenes`), and PNG files
are written here with stored blocks, so that no compression library has a say.

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
import os
import shutil
import struct
import tempfile
import time
import zlib
from typing import Any, Dict, Iterator, List, NamedTuple

import numpy as np

from .scenes import SPLITS, DigitScenesParams, load_material, render_scene

__all__ = [
    "CLASS_NAMES",
    "DigitScenesPaths",
    "build_digit_scenes",
    "digit_scenes_paths",
]

logger = logging.getLogger(__name__)

CLASS_NAMES = tuple(str(digit) for digit in range(10))

# Part of the name of the cache directory; raised whenever a scene would look different.
_VERSION = 1
_LOCK_TIMEOUT = 900.0  # seconds
_TEMPORARY = ".generating."
_ABANDONED = 3600.0  # seconds without a change after which a temporary folder is removed


class DigitScenesPaths(NamedTuple):
    """Where the files of one set of parameters are."""

    directory: str
    train_images: str
    train_json: str
    val_images: str
    val_json: str
    manifest: str


def _key(params: DigitScenesParams) -> str:
    """Name of the cache directory: 12 hex digits that depend on all parameters."""
    text = json.dumps([_VERSION, dataclasses.asdict(params)], sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def digit_scenes_paths(root: str, params: DigitScenesParams) -> DigitScenesPaths:
    """The paths below ``root`` (the folder of all data sets); touches no file."""
    directory = os.path.join(root, "digit_scenes", _key(params))
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
            _remove_abandoned(parent)
            temporary = tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent)
            try:
                _generate(temporary, parameters, progress)
                _replace(temporary, paths.directory)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return paths


def _generate(directory: str, params: DigitScenesParams, progress: bool) -> None:
    from tqdm import tqdm

    counts = {"train": params.num_train, "val": params.num_val}
    material = load_material()
    digest = hashlib.sha256()
    start = time.perf_counter()
    with tqdm(
        total=sum(counts.values()), desc="digit-scenes", unit="img", disable=not progress
    ) as bar:
        for split in SPLITS:
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


def _remove_abandoned(parent: str) -> None:
    """Remove what killed processes have left."""
    for name in os.listdir(parent):
        folder = os.path.join(parent, name)
        if name.startswith(_TEMPORARY):
            with contextlib.suppress(OSError):
                times = [entry.stat().st_mtime for entry in os.scandir(folder)]
                newest = max(times, default=os.stat(folder).st_mtime)
                if time.time() - newest > _ABANDONED:
                    shutil.rmtree(folder, ignore_errors=True)


def _replace(temporary: str, directory: str) -> None:
    """Rename a finished folder to its final name, out of which an incomplete one is moved."""
    os.chmod(temporary, 0o755)
    if os.path.isdir(directory):
        stale = tempfile.mkdtemp(prefix=_TEMPORARY, dir=os.path.dirname(directory))
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
