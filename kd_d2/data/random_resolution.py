"""Dynamic resolution: every training image is drawn one of several sizes; batches have one."""

import logging
from typing import Any, Callable, Dict, Hashable, Iterable, Iterator, List, Sequence, Tuple

import numpy as np
from detectron2.config import configurable
from detectron2.data import DatasetMapper

from .mappers import MAPPER_REGISTRY

__all__ = ["GroupedBatches", "RandomResolutionMapper", "at_resolution"]

logger = logging.getLogger(__name__)

Size = Tuple[int, int]


def at_resolution(cfg, size: Size, is_train: bool) -> DatasetMapper:
    """Return Detectron2's mapper for one nominal size, the aspect ratio being kept.

    Args:
        cfg: whole config; its sizes are not read.
        size: the two sides in pixels, in either order; the shorter side of an image becomes the
            smaller number, unless the longer one would exceed the larger number.
        is_train: with the other augmentations of ``INPUT``, and with annotations.
    """
    cfg = cfg.clone()
    cfg.defrost()
    mode = "TRAIN" if is_train else "TEST"
    cfg.INPUT[f"MIN_SIZE_{mode}"] = (min(size),) if is_train else min(size)
    cfg.INPUT[f"MAX_SIZE_{mode}"] = max(size)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    return DatasetMapper(cfg, is_train)


@MAPPER_REGISTRY.register()
class RandomResolutionMapper:
    """Detectron2's mapper, with one of ``INPUT.RESOLUTIONS`` drawn for every training image.

    "Dynamic resolution" of Joint-DetNAS (Sec. 3.1.2, A.1.3). The mapped dict has the entry
    "resolution", the nominal size. In evaluation it is Detectron2's mapper of ``INPUT``'s sizes.
    """

    @configurable
    def __init__(
        self, *, mappers: Sequence[Callable], sizes: Sequence[Size] = (), key_by_shape=True
    ):
        """
        Args:
            mappers: one a size; the only one, without sizes, where nothing is drawn.
            sizes: nominal sizes, pixels.
            key_by_shape: upright and wide images do not share a batch.
        """
        self._mappers, self._sizes = list(mappers), [tuple(size) for size in sizes]
        self._key_by_shape = key_by_shape

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        if not is_train:
            return {"mappers": [DatasetMapper(cfg, False)]}
        sizes = [tuple(size) for size in cfg.INPUT.RESOLUTIONS]
        if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError(
                "INPUT.MAPPER 'RandomResolutionMapper' draws from INPUT.RESOLUTIONS, which must be "
                f"pairs of positive numbers of pixels, got {cfg.INPUT.RESOLUTIONS}"
            )
        logger.info(f"Dynamic resolution: {sizes}")
        return {
            "mappers": [at_resolution(cfg, size, True) for size in sizes],
            "sizes": sizes,
            "key_by_shape": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        }

    def __call__(self, record: Dict[str, Any]) -> Dict[str, Any]:
        if not self._sizes:
            return self._mappers[0](record)
        index = np.random.randint(len(self._sizes))
        mapped = self._mappers[index](record)
        if mapped is not None:
            mapped["resolution"] = self._sizes[index]
        return mapped

    def batch_key(self, mapped: Dict[str, Any]) -> Hashable:
        """Images of equal keys may share a batch; see :class:`GroupedBatches`."""
        wide = self._key_by_shape and mapped["width"] > mapped["height"]
        return (wide, mapped.get("resolution"))


class GroupedBatches:
    """Batches of images with equal keys, out of a stream of single ones.

    Detectron2's ``AspectRatioGroupedDataset`` with any key. What waits for companions when an
    iterator is dropped is dropped with it.
    """

    def __init__(
        self,
        singles: Iterable[List[Dict[str, Any]]],
        batch_size: int,
        key: Callable[[Dict[str, Any]], Hashable],
    ):
        """
        Args:
            singles: lists of one mapped image.
            batch_size: images of a batch.
            key: of a mapped image.
        """
        self.singles, self.batch_size, self.key = singles, batch_size, key

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        waiting: Dict[Hashable, List[Dict[str, Any]]] = {}
        for (mapped,) in self.singles:
            key = self.key(mapped)
            group = waiting.setdefault(key, [])
            group.append(mapped)
            if len(group) == self.batch_size:
                yield waiting.pop(key)
