"""Pictures and tables of results."""

from .bars import draw_bars
from .curves import draw_curves
from .detections import draw_detections
from .matrices import draw_matrices
from .overlay import draw_overlay, overlay_size, side_by_side
from .page import html_page, markdown_table
from .panels import draw_panels

__all__ = [
    "draw_bars",
    "draw_curves",
    "draw_detections",
    "draw_matrices",
    "draw_overlay",
    "draw_panels",
    "html_page",
    "markdown_table",
    "overlay_size",
    "side_by_side",
]
