"""Graphs as TorchScript files."""

import io
import json
import warnings
from typing import Callable, Dict

import torch
from torch import Tensor

from .graph import DetectionGraph, Detections

__all__ = ["METADATA_NAME", "load_torchscript", "to_torchscript"]

# Extra file of the archive; torch.jit.load(..., _extra_files={METADATA_NAME: ""}) reads it.
METADATA_NAME = "metadata.json"


def to_torchscript(graph: DetectionGraph, example: Tensor, metadata: Dict[str, str]) -> bytes:
    """The traced graph, with the number and size of images free.

    Args:
        graph: built with the operators :data:`.operators.PYTORCH`.
        example: (N, 3, H, W); the file takes any type.
        metadata: stored as JSON in the archive, :data:`METADATA_NAME`.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # Warns of each Python number in the graph; that they may be constants is checked later.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(graph, (example,), check_trace=False)
        torch.jit.save(traced, buffer, _extra_files={METADATA_NAME: json.dumps(metadata)})
    return buffer.getvalue()


def load_torchscript(data: bytes) -> Callable[[Tensor], Detections]:
    """The graph in the interpreter of TorchScript, on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.jit.load(io.BytesIO(data), map_location="cpu")

    def run(images: Tensor) -> Detections:
        with torch.no_grad():
            return Detections(*graph(images))

    return run
