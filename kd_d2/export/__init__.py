"""The trained student alone: as a checkpoint, and as a graph for other runtimes."""

from .comparison import Comparison, Tolerance, compare_with_model
from .graph import DETECTION_GRAPHS, DetectionGraph, Detections, build_graph
from .graph_files import (
    GRAPH_FORMATS,
    INPUT_TYPES,
    GraphFile,
    check_request,
    read_images,
    write_graphs,
)
from .student import (
    CONFIG_NAME,
    SAFETENSORS_NAME,
    WEIGHTS_NAME,
    Export,
    build_student,
    export_student,
    find_checkpoint,
    needed_packages,
    student_config,
)

# Importing registers the graphs of these detectors.
from . import dense, rcnn  # isort: skip

__all__ = [
    "CONFIG_NAME",
    "Comparison",
    "DETECTION_GRAPHS",
    "DetectionGraph",
    "Detections",
    "Export",
    "GRAPH_FORMATS",
    "GraphFile",
    "INPUT_TYPES",
    "SAFETENSORS_NAME",
    "Tolerance",
    "WEIGHTS_NAME",
    "build_graph",
    "build_student",
    "check_request",
    "compare_with_model",
    "export_student",
    "find_checkpoint",
    "needed_packages",
    "read_images",
    "student_config",
    "write_graphs",
]
