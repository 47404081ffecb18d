"""Pictures and tables of results."""

from .curves import draw_curves
from .detections import draw_detections
from .page import html_page, markdown_table

__all__ = ["draw_curves", "draw_detections", "html_page", "markdown_table"]
