"""Evaluators chosen by the kind of a data set, over all images or a sample."""

from .build import (
    EVALUATOR_BUILDERS,
    SubsetEvaluator,
    build_evaluator,
    build_sample_evaluator,
)
from .tide import TideEvaluator, TideResult, tide_errors
from .voc import PascalVOCEvaluator, SampledPascalVOCEvaluator

__all__ = [
    "EVALUATOR_BUILDERS",
    "PascalVOCEvaluator",
    "SampledPascalVOCEvaluator",
    "SubsetEvaluator",
    "TideEvaluator",
    "TideResult",
    "build_evaluator",
    "build_sample_evaluator",
    "tide_errors",
]
