"""Pictures and videos with what was detected, none of them in place of an input."""

import contextlib
import os
from typing import Dict, List, Optional, Sequence

import numpy as np
from PIL import Image

from kd_d2.checkpoint import atomic_write

from .sources import Source

__all__ = ["Outputs", "picture_names"]


def picture_names(sources: Sequence[Source], folder: str) -> Dict[str, str]:
    """Path of the picture or video of every source, by its title.

    Sources of equal names get numbers.

    Raises:
        ValueError: such a path is an input.
    """
    inputs = {os.path.realpath(source.path) for source in sources if source.path}
    taken: set = set()
    result = {}
    for source in sources:
        ending = ".mp4" if source.moving else ".jpg"
        name, number = source.stem + ending, 1
        while name.lower() in taken:
            number += 1
            name = f"{source.stem}_{number}{ending}"
        taken.add(name.lower())
        path = os.path.join(folder, name)
        if os.path.realpath(path) in inputs:
            raise ValueError(
                f"{path}, where the picture of {source.title} belongs, is an input; give another "
                "--output"
            )
        result[source.title] = path
    return result


class Outputs:
    """Writes the pictures of one source: an image file, or the frames of a video.

    A context manager; a video takes its place when the block ends, and is complete then. After an
    interruption (KeyboardInterrupt) it holds what there is, after another exception it is removed.

    Args:
        path: of the picture or video.
        source: whose frames they are.
    """

    def __init__(self, path: str, source: Source):
        self._path, self._source = path, source
        self._video: Optional[_Video] = None
        self.written: List[str] = []

    def __enter__(self) -> "Outputs":
        return self

    def add(self, picture: np.ndarray) -> None:
        """Write a picture, (H, W, 3) uint8 RGB."""
        if not self._source.moving:
            with atomic_write(self._path) as file:
                Image.fromarray(picture).save(file, format="JPEG", quality=92)
            self.written.append(self._path)
            return
        if self._video is None:
            self._video = _Video(self._path, self._source.fps, picture)
        self._video.add(picture)

    def __exit__(self, kind, error, trace) -> None:
        if self._video is None:
            return
        if kind is None or issubclass(kind, (KeyboardInterrupt, GeneratorExit)):
            self._video.finish()
            self.written.append(self._path)
        else:
            self._video.drop()


class _Video:
    """An MP4 file that is written under a hidden name."""

    def __init__(self, path: str, fps: float, first: np.ndarray):
        import cv2

        self._path, self._size = path, first.shape[:2]
        folder, name = os.path.split(path)
        self._temporary = os.path.join(folder, f".unfinished.{name}")
        height, width = self._size
        code = cv2.VideoWriter_fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(self._temporary, code, fps, (width, height))
        if not self._writer.isOpened():
            self.drop()
            raise ValueError(
                f"opencv cannot write {path}: this build of it has no encoder for MP4 (mp4v)"
            )

    def add(self, picture: np.ndarray) -> None:
        import cv2

        if picture.shape[:2] != self._size:  # some cameras change their mind
            picture = cv2.resize(picture, self._size[::-1])
        self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def finish(self) -> None:
        self._writer.release()
        os.replace(self._temporary, self._path)

    def drop(self) -> None:
        self._writer.release()
        with contextlib.suppress(OSError):
            os.remove(self._temporary)
