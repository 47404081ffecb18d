"""Registration of the data sets that the library knows, by their usual folder layout.

Nothing is registered on import; the entry script calls :func:`register_all`. Registering reads
no file: what is missing is reported when a data set is used, in one sentence.
"""

import functools
import logging
import os
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import detectron2.data.datasets  # noqa: F401 (registers COCO and VOC below its own root)
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.coco import load_coco_json
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from detectron2.data.datasets.pascal_voc import load_voc_instances

from .bdd100k import BDD100K_CLASSES, load_bdd100k_json
from .checks import explain_coco_json, missing_files
from .digit_scenes import CLASS_NAMES as DIGIT_CLASSES
from .digit_scenes import build_digit_scenes, digit_scenes_paths
from .scenes import DigitScenesParams

__all__ = ["BCCD_CLASSES", "dataset_root", "load_checked_coco_json", "register_all"]

logger = logging.getLogger(__name__)

BCCD_CLASSES = ("Platelets", "RBC", "WBC")

_COCO_SOURCE = (
    "download train2017.zip, val2017.zip and annotations_trainval2017.zip from "
    "https://cocodataset.org/#download and unpack them into the folder coco"
)
_VOC_SOURCE = (
    "download the development kit's archives from http://host.robots.ox.ac.uk/pascal/VOC and "
    "unpack the folders VOC2007 and VOC2012"
)
_BDD100K_SOURCE = (
    "register at https://bdd-data.berkeley.edu, download '100K Images' and 'Detection 2020 "
    "Labels' and unpack them into the folder bdd100k"
)
_BCCD_SOURCE = (
    "take the images of https://github.com/Shenggan/BCCD_Dataset and convert their annotations "
    "to COCO's format, split into trainval and test"
)

_COCO_2017 = {
    "coco_2017_train": ("coco/train2017", "coco/annotations/instances_train2017.json"),
    "coco_2017_val": ("coco/val2017", "coco/annotations/instances_val2017.json"),
}
_BCCD = {
    "bccd_trainval": ("bccd/images", "bccd/instances_trainval.json"),
    "bccd_test": ("bccd/images", "bccd/instances_test.json"),
}
_BDD100K = {
    "bdd100k_train": ("bdd100k/images/100k/train", "bdd100k/labels/det_20/det_train.json"),
    "bdd100k_val": ("bdd100k/images/100k/val", "bdd100k/labels/det_20/det_val.json"),
}
_VOC = {
    "voc_2007_trainval": (("VOC2007", "trainval"),),
    "voc_2007_train": (("VOC2007", "train"),),
    "voc_2007_val": (("VOC2007", "val"),),
    "voc_2007_test": (("VOC2007", "test"),),
    "voc_2012_trainval": (("VOC2012", "trainval"),),
    "voc_2012_train": (("VOC2012", "train"),),
    "voc_2012_val": (("VOC2012", "val"),),
    "voc_0712_trainval": (("VOC2007", "trainval"), ("VOC2012", "trainval")),
}


def dataset_root(root: Optional[str] = None) -> str:
    """The folder of all data sets: ``root``, else $DETECTRON2_DATASETS, else ./datasets."""
    return os.path.expanduser(root or os.environ.get("DETECTRON2_DATASETS") or "datasets")


def register_all(cfg=None, root: Optional[str] = None) -> None:
    """Register digit-scenes, BCCD, COCO 2017, VOC 2007, 2012 and both together, and BDD100K.

    May be called any number of times: a name is registered anew only if its files or parameters
    are different from before. COCO and VOC have Detectron2's names and metadata, but ``root``
    and the environment are read now and not when Detectron2 was imported.

    Args:
        cfg: its DATASETS.DIGIT_SCENES are the parameters of digit-scenes; None: the defaults.
        root: see :func:`dataset_root`.

    Raises:
        ValueError: if a parameter of digit-scenes is not allowed.
    """
    if isinstance(cfg, (str, os.PathLike)):
        raise ValueError(
            f"register_all got the path {cfg} as its config; call register_all(root=...) to name "
            "the folder of the data sets."
        )
    root = dataset_root(root)
    params = DigitScenesParams() if cfg is None else DigitScenesParams.from_config(cfg)
    _register_digit_scenes(root, params)
    for name, (images, json_file) in _BCCD.items():
        _register_coco(name, root, images, json_file, BCCD_CLASSES, _BCCD_SOURCE)
    metadata = _get_builtin_metadata("coco")
    for name, (images, json_file) in _COCO_2017.items():
        _register_coco(name, root, images, json_file, metadata=metadata, source=_COCO_SOURCE)
    for name, parts in _VOC.items():
        _register_voc(name, root, parts)
    for name, (images, json_file) in _BDD100K.items():
        images, json_file = os.path.join(root, images), os.path.join(root, json_file)
        _register(
            name,
            functools.partial(load_bdd100k_json, json_file, images),
            (json_file, images),
            _BDD100K_SOURCE,
            thing_classes=list(BDD100K_CLASSES),
            image_root=images,
            label_file=json_file,  # not "json_file", which stands for COCO's format
            evaluator_type="coco",
        )


def load_checked_coco_json(json_file: str, image_root: str, name: str) -> List[Dict[str, Any]]:
    """Detectron2's ``load_coco_json``, whose failures are explained.

    Raises:
        ValueError: if the file is broken or empty, has an annotation of a category that it does
            not list, or has other classes than were registered, naming file and annotation.
    """
    try:
        dicts = load_coco_json(json_file, image_root, name)
    except (AssertionError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        classes = MetadataCatalog.get(name).get("thing_classes")
        problem = explain_coco_json(json_file, classes)
        raise ValueError(problem or f"{json_file} cannot be loaded: {error}") from error
    if not dicts:
        raise ValueError(f"{json_file} lists no images, so the data set {name} is empty.")
    return dicts


def _register_digit_scenes(root: str, params: DigitScenesParams) -> None:
    paths = digit_scenes_paths(root, params)
    splits = {
        "digit_scenes_train": (paths.train_json, paths.train_images),
        "digit_scenes_val": (paths.val_json, paths.val_images),
    }
    for name, (json_file, images) in splits.items():
        _register(
            name,
            functools.partial(_load_digit_scenes, root, params, json_file, images, name),
            (),
            "",
            thing_classes=list(DIGIT_CLASSES),
            thing_dataset_id_to_contiguous_id={digit + 1: digit for digit in range(10)},
            json_file=json_file,
            image_root=images,
            evaluator_type="coco",
        )


def _load_digit_scenes(
    root: str, params: DigitScenesParams, json_file: str, images: str, name: str
) -> List[Dict[str, Any]]:
    build_digit_scenes(root, **vars(params))
    return load_checked_coco_json(json_file, images, name)


def _register_coco(
    name: str,
    root: str,
    images: str,
    json_file: str,
    classes: Sequence[str] = (),
    source: str = "",
    metadata: Optional[Dict[str, Any]] = None,
) -> None:
    images, json_file = os.path.join(root, images), os.path.join(root, json_file)
    metadata = metadata or {
        "thing_classes": list(classes),
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(classes))},
    }
    _register(
        name,
        functools.partial(load_checked_coco_json, json_file, images, name),
        (json_file, images),
        source,
        json_file=json_file,
        image_root=images,
        evaluator_type="coco",
        **metadata,
    )


def _register_voc(name: str, root: str, parts: Tuple[Tuple[str, str], ...]) -> None:
    folders = tuple((os.path.join(root, folder), split) for folder, split in parts)
    files = []
    for folder, split in folders:
        files.append(os.path.join(folder, "ImageSets", "Main", split + ".txt"))
        files += [os.path.join(folder, "Annotations"), os.path.join(folder, "JPEGImages")]
    metadata: Dict[str, Any] = {"thing_classes": list(VOC_CLASSES)}
    if len(folders) == 1:  # the evaluator reads one folder; the union is for training only
        folder, split = folders[0]
        year = int(os.path.basename(folder)[-4:])
        metadata.update(dirname=folder, split=split, year=year, evaluator_type="pascal_voc")
    _register(name, functools.partial(_load_voc, folders), tuple(files), _VOC_SOURCE, **metadata)


def _load_voc(folders: Tuple[Tuple[str, str], ...]) -> List[Dict[str, Any]]:
    dicts: List[Dict[str, Any]] = []
    for folder, split in folders:
        try:
            dicts += load_voc_instances(folder, split, VOC_CLASSES)
        except ValueError as error:
            raise ValueError(
                f"The annotations of {split} in {folder} cannot be read, mend or remove the file "
                f"at fault: {error}."
            ) from error
    return dicts


def _register(
    name: str,
    load: Callable[[], List[Dict[str, Any]]],
    files: Tuple[str, ...],
    source: str,
    **metadata: Any,
) -> None:
    """Register one name, or leave it as it is if it stands for the same already.

    Args:
        name: of the data set.
        load: returns its dictionaries.
        files: files and folders that have to be there.
        source: how to get them, to follow "to get it, ".
        **metadata: attributes for the MetadataCatalog.
    """
    metadata.update(required_files=list(files), source=source)
    if name in DatasetCatalog:
        present = MetadataCatalog.get(name).as_dict()
        if all(key in present and present[key] == value for key, value in metadata.items()):
            return
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    elif name in MetadataCatalog:
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, functools.partial(_load, name, load))
    MetadataCatalog.get(name).set(**metadata)


def _load(name: str, load: Callable[[], List[Dict[str, Any]]]) -> List[Dict[str, Any]]:
    problem = missing_files(name)
    if problem:
        raise FileNotFoundError(problem)
    return load()
