"""Mappers by name, and mapping of images with a defined answer to those that cannot be used."""

import logging
from typing import Any, Callable, Dict, Optional, Set

from detectron2.data import DatasetMapper
from detectron2.utils.registry import Registry
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import Dataset, get_worker_info

__all__ = ["MAPPER_REGISTRY", "NamingMapper", "RobustDataset", "build_mapper"]

logger = logging.getLogger(__name__)

_BAD_IMAGE = ("skip", "stop")

MAPPER_REGISTRY = Registry("MAPPER")
MAPPER_REGISTRY.__doc__ = """
Mappers, looked up by INPUT.MAPPER and called with the config and ``is_train``.
"""
MAPPER_REGISTRY.register(DatasetMapper)


def build_mapper(cfg, is_train: bool) -> Callable[[Dict[str, Any]], Any]:
    """Return the mapper that ``INPUT.MAPPER`` names.

    Raises:
        ValueError: there is none of that name.
    """
    name = cfg.INPUT.MAPPER
    if name not in MAPPER_REGISTRY:
        known = sorted(entry for entry, _ in MAPPER_REGISTRY)
        raise ValueError(f"INPUT.MAPPER must be one of {known}, got '{name}'")
    return MAPPER_REGISTRY.get(name)(cfg, is_train)


class NamingMapper:
    """A mapper whose failures name the image: for evaluation, where nothing may be skipped.

    Args:
        mapper: takes and returns a dictionary, see :class:`detectron2.data.DatasetMapper`.
    """

    def __init__(self, mapper: Callable[[Dict[str, Any]], Any]):
        self.mapper = mapper

    def __call__(self, record: Dict[str, Any]) -> Any:
        try:
            return self.mapper(record)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"The image {_file_name(record)} cannot be used for evaluation "
                f"({_reason(error)}); mend it or take it out of the annotation file."
            ) from error


class RobustDataset(Dataset):
    """A data set of mapped images in which the next usable image stands in for a bad one.

    Bad is an image for which the mapper raises: the file is missing or corrupt, its size (after
    the rotation that its EXIF data ask for) is not the annotated one, or its annotations are
    malformed. A mapper that returns None skips the image silently, as Detectron2 allows.
    The stand-in is the image after it in the data set, so it is the same in every run. Images
    of one channel, with a palette or with alpha (which is ignored) are good ones; of 16 bits per
    channel too, but Pillow clips their values at 255, so convert them beforehand.

    Used in place of Detectron2's ``MapDataset``, with which it agrees on good images; no random
    number is drawn here. Counts are those of one process, i.e. of one worker of a data loader.

    Args:
        dataset: map-style data set of dictionaries.
        mapper: takes and returns a dictionary.
        bad_image: "skip" counts, warns once per file and goes on; "stop" raises.
        max_bad_fraction: with "skip", raise when more than this fraction of the images tried was
            bad.
        min_tried: number of images tried before the fraction is looked at.

    Raises:
        ValueError: if ``bad_image`` is unknown or ``max_bad_fraction`` not in 0 to 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        mapper: Callable[[Dict[str, Any]], Any],
        *,
        bad_image: str = "skip",
        max_bad_fraction: float = 0.1,
        min_tried: int = 50,
    ):
        if bad_image not in _BAD_IMAGE:
            raise ValueError(
                f"DATALOADER.BAD_IMAGE is {bad_image!r}; it has to be one of "
                f"{', '.join(map(repr, _BAD_IMAGE))}."
            )
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(
                f"DATALOADER.MAX_BAD_FRACTION is {max_bad_fraction}; it has to lie between 0 and 1."
            )
        self.dataset = dataset
        self.mapper = PicklableWrapper(mapper)
        self.bad_image = bad_image
        self.max_bad_fraction = max_bad_fraction
        self.min_tried = min_tried
        self.num_tried = 0
        self.num_bad = 0
        self._warned: Set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """The mapped image ``index``, or the next usable one.

        Raises:
            ValueError: for a bad image with "stop", after too many bad ones with "skip", and if
                no image at all is usable; each names the last file and the reason.
        """
        index, size = int(index), len(self.dataset)
        last: Optional[Exception] = None
        record: Dict[str, Any] = {}
        for step in range(size):
            record = self.dataset[(index + step) % size]
            self.num_tried += 1
            try:
                mapped = self.mapper(record)
            except MemoryError:
                raise
            except Exception as error:  # whatever a file's content makes the libraries raise
                self._count(record, error)
                last = error
                continue
            if mapped is not None:
                return mapped
        raise ValueError(
            f"None of the {size} training images can be used; the last is {_file_name(record)} "
            f"({_reason(last) if last else 'the mapper returned None'})."
        ) from last

    def _count(self, record: Dict[str, Any], error: Exception) -> None:
        name = _file_name(record)
        if self.bad_image == "stop":
            raise ValueError(
                f"The training image {name} cannot be used ({_reason(error)}); mend it, take it "
                "out of the annotation file, or set DATALOADER.BAD_IMAGE to 'skip'."
            ) from error
        self.num_bad += 1
        enough = self.num_tried >= self.min_tried
        if enough and self.num_bad > self.max_bad_fraction * self.num_tried:
            raise ValueError(
                f"{self.num_bad} of {self.num_tried} training images could not be used, more than "
                f"the fraction {self.max_bad_fraction} that DATALOADER.MAX_BAD_FRACTION allows; "
                f"the last is {name} ({_reason(error)})."
            ) from error
        if name not in self._warned:
            self._warned.add(name)
            worker = get_worker_info()
            logger.warning(
                "Skipped the training image %s (%s); %d of %d images tried%s were bad.",
                name,
                _reason(error),
                self.num_bad,
                self.num_tried,
                "" if worker is None else f" by worker {worker.id}",
            )


def _file_name(record: Dict[str, Any]) -> str:
    return str(record.get("file_name", record.get("image_id", "without a name")))


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
