"""ONNX and TorchScript files of a detector, checked against it before they are written."""

import json
import logging
import os
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from torch import Tensor, nn

from kd_d2 import __version__
from kd_d2.checkpoint import MissingFileError, atomic_write

from .comparison import Comparison, Tolerance, compare_with_model
from .graph import DetectionGraph, Detections, build_graph
from .onnx_format import load_onnx, require_onnx, to_onnx
from .operators import ONNX, PYTORCH, Operators
from .torchscript_format import load_torchscript, to_torchscript

__all__ = [
    "GRAPH_FORMATS",
    "GraphFile",
    "GraphFormat",
    "INPUT_TYPES",
    "check_request",
    "read_images",
    "write_graphs",
]

logger = logging.getLogger(__name__)

INPUT_TYPES = {"uint8": torch.uint8, "float32": torch.float32}

# Neither side is a multiple of a stride, so that padding is recorded; two images, because some
# operators are recorded differently for one.
_EXAMPLE = (2, 3, 165, 230)


def _nothing() -> None:
    pass


class GraphFormat(NamedTuple):
    """How a graph becomes a file and runs again."""

    file_name: str
    operators: Operators
    write: Callable[[DetectionGraph, Tensor, Dict[str, str]], bytes]
    load: Callable[[bytes], Callable[[Tensor], Detections]]
    require: Callable[[], None] = _nothing
    """Raises ImportError without the packages that it takes."""


GRAPH_FORMATS: Dict[str, GraphFormat] = {
    "onnx": GraphFormat("model_student.onnx", ONNX, to_onnx, load_onnx, require_onnx),
    "torchscript": GraphFormat("model_student.ts", PYTORCH, to_torchscript, load_torchscript),
}


@dataclass
class GraphFile:
    """A written graph.

    Attributes:
        path: of the file.
        comparison: with the model; None: it was not asked for.
    """

    path: str
    comparison: Optional[Comparison]


def write_graphs(
    cfg: CfgNode,
    model: nn.Module,
    output: str,
    formats: Sequence[str],
    images: Sequence[Tensor] = (),
    *,
    check: bool = True,
    tolerance: Tolerance = Tolerance(),
    classes: Sequence[str] = (),
    input_type: str = "uint8",
) -> List[GraphFile]:
    """Write a detector as a function from images to detections.

    It takes (N, 3, H, W) pixels in ``INPUT.FORMAT``, N images of one size, resized as for the
    detector, and returns the fields of :class:`.graph.Detections`. N, H and W are free.

    Args:
        cfg: config of the detector.
        model: built from it, on the CPU, in eval mode; not changed.
        output: existing folder.
        formats: keys of :data:`GRAPH_FORMATS`.
        images: (3, H, W) uint8, to compare on.
        check: compare, and write nothing that differs.
        tolerance: of the comparison.
        classes: names, for the metadata; empty: unknown.
        input_type: of the pixels in an ONNX file, a key of :data:`INPUT_TYPES`.

    Returns:
        one entry per format.

    Raises:
        ValueError: the detector has no graph, a graph detects something else, there are no images
            to compare on, or the detector finds nothing in them.
        ImportError: a format without its package.
    """
    check_request(formats, images, check)
    return [
        _write(cfg, model, output, name, images if check else (), tolerance, classes, input_type)
        for name in formats
    ]


def check_request(formats: Sequence[str], images: Sequence[Any], check: bool) -> None:
    """What can be said about the arguments of :func:`write_graphs` without a detector.

    Args:
        formats, check: as there.
        images: as there, or their paths: only whether there are any matters.

    Raises:
        ValueError: there are no images to compare on.
        ImportError: a format without its package.
    """
    for name in formats:
        GRAPH_FORMATS[name].require()
    if formats and check and not images:
        raise ValueError(
            f"The {' and '.join(formats)} file is compared with the detector before it is written: "
            "give --images to compare on, or --no-check."
        )


def _write(cfg, model, output, name, images, tolerance, classes, input_type) -> GraphFile:
    graph_format = GRAPH_FORMATS[name]
    graph = build_graph(model, graph_format.operators)
    generator = torch.Generator().manual_seed(0)
    example = torch.randint(0, 256, _EXAMPLE, generator=generator).to(INPUT_TYPES[input_type])
    logger.info(f"Recording {type(model).__name__} for {name} ...")
    data = graph_format.write(graph, example, metadata(cfg, graph, classes, input_type))
    comparison = None
    if images:
        logger.info(f"Comparing it with the detector on {len(images)} images ...")
        comparison = compare_with_model(graph_format.load(data), model, images, tolerance)
        if comparison.num_detections == 0 and not comparison.failures:
            raise ValueError(
                f"The detector finds nothing in the {len(images)} images, so that the {name} file "
                "could not be compared and was not written: give images with objects of its "
                "classes, or lower the score threshold of its config."
            )
        if comparison.failures:
            raise ValueError(
                f"The {name} file detects something else than the detector, so it was not written "
                f"({comparison.describe()}):\n  " + "\n  ".join(comparison.failures[:10])
            )
    path = os.path.join(output, graph_format.file_name)
    with atomic_write(path) as file:
        file.write(data)
    return GraphFile(path, comparison)


def metadata(
    cfg: CfgNode, graph: DetectionGraph, classes: Sequence[str], input_type: str
) -> Dict[str, str]:
    """What a user of the file needs to know, as strings; lists as JSON."""
    return {
        "kd_d2_version": __version__,
        "detectron2_version": detectron2.__version__,
        "pytorch_version": torch.__version__,
        "meta_architecture": cfg.MODEL.META_ARCHITECTURE,
        "classes": json.dumps(list(classes)),
        "pixel_format": cfg.INPUT.FORMAT,
        "pixel_type": input_type,
        "min_size_test": str(cfg.INPUT.MIN_SIZE_TEST),
        "max_size_test": str(cfg.INPUT.MAX_SIZE_TEST),
        **{name: str(value) for name, value in graph.settings.items()},
    }


def read_images(cfg: CfgNode, paths: Sequence[str]) -> List[Tensor]:
    """Images as the detector sees them, (3, H, W) uint8.

    Args:
        cfg: INPUT.FORMAT, MIN_SIZE_TEST and MAX_SIZE_TEST.
        paths: image files.

    Raises:
        MissingFileError: one does not exist.
        ValueError: one is no image.
    """
    sides = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
    resize = T.ResizeShortestEdge(sides, cfg.INPUT.MAX_SIZE_TEST)
    images = []
    for path in paths:
        if not os.path.isfile(path):
            raise MissingFileError(f"There is no image {path}.")
        try:
            image = read_image(path, format=cfg.INPUT.FORMAT)
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from None
        image = resize.get_transform(image).apply_image(image)
        images.append(torch.as_tensor(image.transpose(2, 0, 1).copy()))
    return images
