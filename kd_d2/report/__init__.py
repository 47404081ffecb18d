"""One page about any number of runs: scores, configs, curves, errors, costs, detections."""

from .collect import Options, Report, collect
from .cost import CostOptions
from .page import write_page
from .run import Missing, Run, read_runs

__all__ = [
    "CostOptions",
    "Missing",
    "Options",
    "Report",
    "Run",
    "collect",
    "read_runs",
    "write_page",
]
