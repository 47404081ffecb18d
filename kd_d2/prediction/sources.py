"""Images, videos and cameras as iterables of frames."""

import os
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
from detectron2.data import detection_utils

__all__ = ["CameraSource", "Frame", "ImageSource", "Source", "Unreadable", "find_sources"]

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
# frames a second of what does not say
_FPS = 25.0


class Unreadable(ValueError):
    """A file or a camera gives no image; the message names it."""


class Frame(NamedTuple):
    """An image.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        file: path of the image file; "" for a frame of a video or camera.
        number: of the frame in its video, from 0; None for an image file.
    """

    image: np.ndarray
    file: str = ""
    number: Optional[int] = None


class Source:
    """Something that gives frames when it is iterated.

    Attributes:
        title: as it was given, or found in a folder.
        path: of its file; "" if there is none.
        stem: name for what is made of it, without ending.
        moving: whether its frames belong to one video.
        fps: frames a second of a moving source, known once it is iterated.
    """

    title: str
    path: str = ""
    stem: str
    moving: bool = False
    fps: float = _FPS

    def count(self) -> Optional[int]:
        """Number of frames as far as it is known; None if it is not."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames.

        Raises:
            Unreadable: there is no frame.
        """
        raise NotImplementedError


class ImageSource(Source):
    """An image file, rotated as its EXIF data say."""

    def __init__(self, path: str):
        self.title = self.path = path
        self.stem = os.path.splitext(os.path.basename(path))[0]

    def count(self):
        return 1

    def __iter__(self):
        try:
            image = detection_utils.read_image(self.path, format="RGB")
        except MemoryError:
            raise
        except Exception as error:  # whatever a file's content makes Pillow raise
            raise Unreadable(f"{self.path}: {_first_line(error)}") from error
        yield Frame(image, self.path)


class VideoSource(Source):
    """A video file, read by opencv.

    Args:
        path: of the file.
        max_frames: stop after so many; 0: never.
        open_capture: opens what it is given, as ``cv2.VideoCapture`` does; None: that.
    """

    moving = True

    def __init__(self, path: str, max_frames: int = 0, open_capture: Optional[Callable] = None):
        self.title = self.path = path
        self.stem = os.path.splitext(os.path.basename(path))[0]
        self._max_frames = max_frames
        self._open = open_capture or _cv2().VideoCapture

    def _target(self):
        return self.path

    def count(self):
        capture = self._open(self._target())
        try:
            announced = int(capture.get(_cv2().CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        finally:
            capture.release()
        if announced <= 0:
            return self._max_frames or None
        return min(announced, self._max_frames) if self._max_frames else announced

    def __iter__(self):
        cv2 = _cv2()
        capture = self._open(self._target())
        try:
            if not capture.isOpened():
                raise Unreadable(f"{self.title}: opencv cannot open it")
            fps = capture.get(cv2.CAP_PROP_FPS)
            self.fps = fps if 1 <= fps <= 1000 else _FPS
            number = 0
            while not self._max_frames or number < self._max_frames:
                found, image = capture.read()
                if not found:
                    break
                yield Frame(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), "", number)
                number += 1
            if not number:
                raise Unreadable(f"{self.title}: opencv reads no frame of it")
        finally:
            capture.release()


class CameraSource(VideoSource):
    """A camera by its number; it goes on until ``max_frames`` or an interruption."""

    def __init__(self, number: int, max_frames: int = 0, open_capture: Optional[Callable] = None):
        super().__init__("", max_frames, open_capture)
        self.title, self.stem, self._number = f"camera {number}", f"camera_{number}", number

    def _target(self):
        return self._number

    def count(self):
        return self._max_frames or None


def find_sources(
    inputs: Sequence[str],
    output: str = "",
    max_frames: int = 0,
    open_capture: Optional[Callable] = None,
) -> List[Source]:
    """The sources that the words of a command line name, each file once.

    Args:
        inputs: images, videos, folders (searched recursively, in alphabetical order) and numbers
            of cameras. A named file that does not end like a video is taken for an image.
        output: folder that is left out of the search: what was made before.
        max_frames: of every video and camera; 0: all.
        open_capture: see :class:`VideoSource`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: nothing was found.
        ImportError: there are videos, but no opencv.
    """
    sources: List[Source] = []
    seen: set = set()  # real paths and numbers of cameras
    for word in inputs:
        if word.isdigit() and not os.path.exists(word):
            if int(word) in seen:
                continue
            seen.add(int(word))
            sources.append(CameraSource(int(word), max_frames, open_capture))
            continue
        if not os.path.exists(word):
            raise FileNotFoundError(f"the input {word} does not exist")
        for path in _files(word, output) if os.path.isdir(word) else [word]:
            if os.path.realpath(path) in seen:
                continue
            seen.add(os.path.realpath(path))
            if path.lower().endswith(VIDEOS):
                sources.append(VideoSource(path, max_frames, open_capture))
            else:
                sources.append(ImageSource(path))
    if not sources:
        raise ValueError(
            f"there is no image or video in {', '.join(inputs)}; files that end in "
            f"{' '.join(IMAGES + VIDEOS)} are looked for"
        )
    return sources


def _files(folder: str, left_out: str) -> List[str]:
    left_out = os.path.realpath(left_out) if left_out else ""
    found = []
    for place, folders, names in os.walk(folder):
        # hidden folders hold thumbnails and the like
        folders[:] = [
            x
            for x in folders
            if not x.startswith(".") and os.path.realpath(os.path.join(place, x)) != left_out
        ]
        found += [
            os.path.join(place, name)
            for name in names
            if name.lower().endswith(IMAGES + VIDEOS) and not name.startswith(".")
        ]
    return sorted(found)


def _cv2():
    try:
        import cv2
    except ImportError as error:
        raise ImportError(
            "videos, cameras and pictures need opencv: pip install opencv-python-headless"
        ) from error
    return cv2


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
