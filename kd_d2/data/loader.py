"""Data loaders: Detectron2's, with robust images and a training stream that resumes exactly."""

import itertools
import logging
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import torch.utils.data as torchdata
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.samplers import RandomSubsetTrainingSampler
from detectron2.utils.comm import get_world_size

from .checks import drop_unusable_annotations
from .mappers import NamingMapper, RobustDataset, build_mapper
from .random_resolution import GroupedBatches

__all__ = [
    "OffsetSampler",
    "ResumableTrainLoader",
    "build_sample_loader",
    "build_test_loader",
    "build_train_loader",
    "evenly_spaced",
]

logger = logging.getLogger(__name__)


class OffsetSampler(torchdata.Sampler):
    """The stream of another sampler without its first ``offset`` indices."""

    def __init__(self, sampler: Iterable[int], offset: int):
        self.sampler = sampler
        self.offset = offset

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(iter(self.sampler), self.offset, None)


class ResumableTrainLoader:
    """An endless training loader that can start again at a given batch.

    Iterating yields what Detectron2's loader yields: lists of the mapped images of this process.
    To resume exactly, the interrupted and the resuming run do the same thing: at a checkpoint
    both call :meth:`rewind` with the number of batches consumed and take a new iterator, whose
    stream begins at that batch's position in the sampler's stream. Prefetched images are read
    again and images waiting in an aspect-ratio bucket are dropped, in both runs alike. The
    random states of Python, numpy and torch, which drive the augmentation, are the caller's to
    restore before taking the iterator.

    Args:
        build: makes the loader for a sampler, drawing no random number.
        sampler: Detectron2's training sampler of this process.
        images_per_batch: of this process.
        num_images: size of the data set, kept in the state to notice a change.

    Raises:
        ValueError: if the sampler has no seed, so that its stream could not be repeated.
    """

    def __init__(
        self,
        build: Callable[[torchdata.Sampler], Iterable[List[Dict[str, Any]]]],
        sampler: torchdata.Sampler,
        *,
        images_per_batch: int,
        num_images: int,
    ):
        if not isinstance(getattr(sampler, "_seed", None), int):
            raise ValueError(
                f"The sampler {type(sampler).__name__} (DATALOADER.SAMPLER_TRAIN) keeps no seed, "
                "so training could not be resumed; use one of Detectron2's training samplers."
            )
        self.sampler = sampler
        self.images_per_batch = images_per_batch
        self.num_images = num_images
        self._build = build
        self._batches = 0

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        sampler = self.sampler
        if self._batches:
            sampler = OffsetSampler(sampler, self._batches * self.images_per_batch)
        return iter(self._build(sampler))

    def rewind(self, batches_consumed: int) -> None:
        """Let iterators taken from now on start after this many batches of the stream.

        Raises:
            ValueError: if the number is negative.
        """
        if batches_consumed < 0:
            raise ValueError(
                f"The number of consumed batches is {batches_consumed}; it is negative."
            )
        self._batches = int(batches_consumed)

    def state_dict(self) -> Dict[str, int]:
        """What identifies the stream (not the position in it), as plain integers."""
        state = {"sampler_seed": self.sampler._seed, "num_images": self.num_images}
        if isinstance(self.sampler, RandomSubsetTrainingSampler):
            state["subset_seed"] = self.sampler._seed_subset
        return state

    def load_state_dict(self, state: Dict[str, int]) -> None:
        """Continue the stream of another run; iterators already taken are not affected."""
        if state.get("num_images", self.num_images) != self.num_images:
            logger.warning(
                "The training data have %d images now and had %d when the checkpoint was "
                "written: the order of the images differs from that of an uninterrupted run.",
                self.num_images,
                state["num_images"],
            )
        seed = int(state["sampler_seed"])
        if isinstance(self.sampler, RandomSubsetTrainingSampler):
            # The subset itself is drawn in the constructor.
            old = self.sampler
            self.sampler = RandomSubsetTrainingSampler(
                old._size,
                (old._size_subset + 0.5) / old._size if old._size_subset < old._size else 1.0,
                shuffle=old._shuffle,
                seed_shuffle=seed,
                seed_subset=int(state["subset_seed"]),
            )
        else:
            self.sampler._seed = seed


def build_train_loader(
    cfg, mapper: Optional[Callable[[Dict[str, Any]], Any]] = None
) -> ResumableTrainLoader:
    """The training loader of DATASETS.TRAIN, with the stream of Detectron2's own.

    With the same seeds the images, their order and their augmentation are those of
    ``detectron2.data.build_detection_train_loader(cfg)`` of the installed version. Beyond it, a
    bad image is answered as DATALOADER.BAD_IMAGE and MAX_BAD_FRACTION say, unusable boxes are
    dropped and counted, failures are explained, and the stream can be resumed.

    Args:
        cfg: whole config.
        mapper: default: the one that INPUT.MAPPER names. If it has a method ``batch_key``, mapped
            images share a batch where that gives equal keys, whatever their aspect ratio.

    Raises:
        ValueError: if the data are empty or malformed, naming data set and file, or if a key of
            DATALOADER has an unknown value.
        FileNotFoundError: if a data set is not there.
    """
    names = list(cfg.DATASETS.TRAIN)
    if not names:
        raise ValueError("DATASETS.TRAIN is empty; name at least one data set to train on.")
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    dicts = _load_dicts(
        names,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=proposals,
    )
    if isinstance(dicts, torchdata.IterableDataset):
        raise ValueError(
            f"The data set {names[0]} (DATASETS.TRAIN) is an IterableDataset, whose stream cannot "
            "be resumed; register a list of dictionaries or a map-style data set."
        )
    if isinstance(dicts, list):
        dicts = drop_unusable_annotations(dicts, " + ".join(names))
    if mapper is None:
        mapper = build_mapper(cfg, True)
    try:
        # Detectron2's own choice of the sampler, so that its seed comes from the same draw.
        arguments = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dicts)
    except (AttributeError, ValueError) as error:
        # An AttributeError is a key that the installed version reads but does not define:
        # DATASETS.TRAIN_REPEAT_FACTOR of the weighted samplers.
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN!r}, with which the "
            f"installed Detectron2 cannot build a training sampler ({error})."
        ) from error
    listed = DatasetFromList(dicts, copy=False) if isinstance(dicts, list) else dicts
    robust = RobustDataset(
        listed,
        mapper,
        bad_image=cfg.DATALOADER.BAD_IMAGE,
        max_bad_fraction=cfg.DATALOADER.MAX_BAD_FRACTION,
    )
    sampler = arguments.pop("sampler")
    arguments.update(dataset=robust, mapper=None)
    total, world = arguments["total_batch_size"], get_world_size()
    if total < 1 or total % world:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {total}, which is not a positive multiple of the {world} "
            "processes."
        )

    def build(sampler):
        return build_detection_train_loader(sampler=sampler, **arguments)

    key = getattr(mapper, "batch_key", None)
    if key is not None:
        # single images are mapped, and only then is known which of them may share a batch
        arguments.update(total_batch_size=world, aspect_ratio_grouping=False)
    return ResumableTrainLoader(
        build if key is None else lambda x: GroupedBatches(build(x), total // world, key),
        sampler,
        images_per_batch=total // world,
        num_images=len(robust),
    )


def build_test_loader(cfg, dataset_name: str, mapper=None):
    """Detectron2's test loader of a data set, whose failures name the image.

    Args:
        cfg: whole config.
        dataset_name: one of DATASETS.TEST, or another registered name.
        mapper: default: the one that INPUT.MAPPER names.

    Raises:
        ValueError: if the data set is empty or malformed.
        FileNotFoundError: if it is not there.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        index = list(cfg.DATASETS.TEST).index(dataset_name)
        proposals = [cfg.DATASETS.PROPOSAL_FILES_TEST[index]]
    else:
        proposals = None
    dicts = _load_dicts([dataset_name], filter_empty=False, proposal_files=proposals)
    return build_detection_test_loader(
        dicts,
        mapper=NamingMapper(mapper or build_mapper(cfg, False)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_sample_loader(cfg, dataset_name: str, num_images: int):
    """A test loader over evenly spaced images of a data set, the same ones every time.

    Args:
        cfg: whole config.
        dataset_name: a registered name.
        num_images: size of the sample; all images if the data set has no more.

    Raises:
        ValueError: if ``num_images`` is not positive, or the data set is empty or malformed.
        FileNotFoundError: if it is not there.
    """
    if num_images < 1:
        raise ValueError(f"A sample of {num_images} images of {dataset_name} is not possible.")
    dicts = _load_dicts([dataset_name], filter_empty=False)
    return build_detection_test_loader(
        [dicts[i] for i in evenly_spaced(len(dicts), num_images)],
        mapper=NamingMapper(build_mapper(cfg, False)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def evenly_spaced(size: int, count: int) -> List[int]:
    """``min(count, size)`` different indices below ``size``: the middles of equal parts.

    For example 3 of 10 are 1, 5, 8.
    """
    count = min(count, size)
    return [(2 * i + 1) * size // (2 * count) for i in range(count)]


def _load_dicts(names: Sequence[str], **kwargs: Any):
    """``get_detection_dataset_dicts``, whose assertions about the data become explanations."""
    try:
        return get_detection_dataset_dicts(list(names), **kwargs)
    except AssertionError as error:
        raise ValueError(_explain(names) or str(error)) from error
    except ValueError as error:
        explanation = _explain_classes(names)
        if explanation is None:
            raise
        raise ValueError(explanation) from error


def _explain(names: Sequence[str]) -> Optional[str]:
    for name in names:
        dicts = DatasetCatalog.get(name)
        if not len(dicts):
            return f"The data set {name} has no images; check its annotation file."
        classes = MetadataCatalog.get(name).get("thing_classes")
        for record in dicts:
            for annotation in record.get("annotations") or ():
                category = annotation["category_id"]
                if classes is not None and not 0 <= category < len(classes):
                    return (
                        f"The data set {name} has an annotation of the category {category} in "
                        f"{record.get('file_name')}, but only the categories 0 to "
                        f"{len(classes) - 1}; correct the annotation or the class list."
                    )
    for name in names:
        annotated = any(
            not annotation.get("iscrowd", 0)
            for record in DatasetCatalog.get(name)
            for annotation in record.get("annotations") or ()
        )
        if not annotated:
            return (
                f"No image of the data set {name} has a usable annotation; annotate it or set "
                "DATALOADER.FILTER_EMPTY_ANNOTATIONS to False to train on empty images."
            )
    return None


def _explain_classes(names: Sequence[str]) -> Optional[str]:
    classes = [MetadataCatalog.get(name).get("thing_classes") for name in names]
    for name, others in zip(names, classes):
        if others is not None and classes[0] is not None and list(others) != list(classes[0]):
            return (
                f"The data sets {names[0]} and {name} have different classes, so they cannot be "
                "used together."
            )
    return None
