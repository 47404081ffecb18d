"""The page of a search: progress, trials, Pareto front."""

import importlib.util
import logging
import os
import uuid
from typing import List

from kd_d2.checkpoint import atomic_write
from kd_d2.visualization import html_page, markdown_table

from .course import Course
from .figures import draw_pareto, draw_scores
from .results import HEADER, points, progress, results, rows

__all__ = ["PAGE", "write_page"]

PAGE = "search.html"

logger = logging.getLogger(__name__)


def write_page(course: Course) -> str:
    """Write ``search.html`` and its pictures into the folder of the search; return the progress.

    Each file is complete or the one before; several workers may do this at the same time. Without
    matplotlib there are no pictures.
    """
    trials = course.journal.trials()
    found, line, pictures = results(course, trials), progress(course, trials), []
    if found and importlib.util.find_spec("matplotlib"):
        curves = {"this search": found}
        drawings = {
            "pareto.png": lambda path: draw_pareto({"this search": points(found)}, path),
            "scores.png": lambda path: draw_scores(curves, path),
        }
        pictures = [_replace(course.folder, name, draw) for name, draw in drawings.items()]
    table = markdown_table(HEADER, rows(course, trials))
    with atomic_write(os.path.join(course.folder, PAGE)) as file:
        file.write(html_page("Joint-DetNAS", line, table, pictures).encode())
    return line


def _replace(folder: str, name: str, draw) -> str:
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.{name}")
    try:
        draw(temporary)
        os.replace(temporary, os.path.join(folder, name))
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return name


def report(course: Course) -> List[str]:
    """Log the progress and write the page; a disk that is full does not end a search."""
    try:
        line = write_page(course)
    except OSError as error:
        logger.warning(f"{PAGE} could not be written: {error}")
        line = progress(course, course.journal.trials())
    logger.info(line)
    return [line]
