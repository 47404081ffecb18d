"""Detection in files and cameras: what comes in, the detectors, and what is written."""

from .detector import Detector, class_names_of
from .outputs import Outputs, picture_names
from .results import CocoResults
from .sources import Frame, Source, Unreadable, find_sources

__all__ = [
    "CocoResults",
    "Detector",
    "Frame",
    "Outputs",
    "Source",
    "Unreadable",
    "class_names_of",
    "find_sources",
    "picture_names",
]
