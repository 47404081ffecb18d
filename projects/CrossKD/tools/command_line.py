"""Options of the commands in this folder that draw a picture of every image."""

import argparse
from typing import List, Sequence

from kd_d2.projects.crosskd.analysis.pictures import level_name

__all__ = ["add_drawing", "chosen_levels"]


def add_drawing(result: argparse.ArgumentParser) -> None:
    """Options of the commands that draw a picture of every image."""
    result.add_argument(
        "--pictures",
        type=int,
        default=8,
        metavar="N",
        help="draw the first N images; arrays are written for all (default: %(default)s)",
    )
    result.add_argument(
        "--levels", default="", metavar="P3,P4,...", help="levels to draw (default: all)"
    )


def chosen_levels(text: str, strides: Sequence[int]) -> List[int]:
    """Indices of the levels named in ``text``, e.g. "p3,p4"; all if it is empty.

    Raises:
        ValueError: the detector has no such level.
    """
    known = [level_name(stride) for stride in strides]
    names = [name.strip().lower() for name in text.split(",")] if text else known
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"--levels names '{wrong[0]}', the detector has {', '.join(known)}")
    return [known.index(name) for name in names]
