"""The score H of a student: AP against complexity and resolution (Sec. 3.1.4)."""

import math
from typing import Any, Dict, Mapping, NamedTuple, Optional

from detectron2.config import configurable

from kd_d2.config import choice

from .cost import Size, backbone_cost, detector_cost, total
from .space import Architecture

__all__ = ["Best", "StudentScore", "score"]

# Value of SEARCH.SCORE.COST -> cost by module; the options are those of detector_cost.
_COSTS = {
    "backbone": lambda architecture, size, options: backbone_cost(architecture, size),
    "detector": lambda architecture, size, options: detector_cost(architecture, size, **options),
}


def score(
    ap: float, cost_ratio: float, resolution_ratio: float, *, alpha: float = 0.4, beta: float = 0.8
) -> float:
    """H = AP [(C / C_base) (R / R_base)^beta]^(-alpha).

    With AP 40, both ratios 1/2 and the default exponents: 40 * 2^(0.4 * 1.8) = 65.8873.

    Args:
        ap: average precision; on which scale does not change a ranking.
        cost_ratio: complexity over that of the base detector, > 0.
        resolution_ratio: pixels of the input over those of the base resolution, > 0.
        alpha: 0 ranks by AP alone; the paper has 0.4, and 0.1 for X101.
        beta: weight of the resolution.

    Raises:
        ValueError: AP is not finite, or a ratio not positive.
    """
    if not math.isfinite(ap):
        raise ValueError(f"the AP of a score must be finite, got {ap}")
    if not (cost_ratio > 0 and resolution_ratio > 0):
        raise ValueError(f"ratios must be positive, got {cost_ratio} and {resolution_ratio}")
    return ap * (cost_ratio * resolution_ratio**beta) ** -alpha


class Best(NamedTuple):
    """The best score of a student and the resolution, (width, height), that has it."""

    score: float
    size: Size


class StudentScore:
    """H of students against one base detector, as the node ``SEARCH.SCORE`` says."""

    @configurable
    def __init__(
        self,
        *,
        base: Architecture,
        base_size: Size,
        alpha: float,
        beta: float,
        cost: str,
        detector: Optional[Mapping[str, Any]] = None,
    ):
        """
        Args:
            base: architecture of the base detector.
            base_size: (width, height) that complexity is counted at and resolutions are compared
                with.
            alpha, beta: exponents.
            cost: "backbone" or "detector".
            detector: options of :func:`detector_cost` that are not the paper's.

        Raises:
            ValueError: unknown cost, or exponents or sizes that make no sense.
        """
        self._cost = _COSTS[choice("SEARCH.SCORE.COST", cost, _COSTS)]
        if not (alpha >= 0 and beta >= 0):
            raise ValueError(
                f"SEARCH.SCORE.ALPHA and BETA must not be negative, got {alpha} and {beta}"
            )
        if len(base_size) != 2 or min(base_size) < 1:
            raise ValueError(f"SEARCH.SCORE.BASE_SIZE must be (long, short), got {base_size}")
        self.base_size = (int(base_size[0]), int(base_size[1]))
        self.alpha, self.beta = alpha, beta
        self._detector = dict(detector or {})
        self._base_cost = self.cost(base)

    @classmethod
    def from_config(cls, cfg, base: Architecture) -> Dict[str, Any]:
        node, anchors = cfg.SEARCH.SCORE, cfg.MODEL.ANCHOR_GENERATOR
        return {
            "base": base,
            "base_size": tuple(node.BASE_SIZE),
            "alpha": node.ALPHA,
            "beta": node.BETA,
            "cost": node.COST,
            "detector": {
                "fpn": cfg.MODEL.FPN.OUT_CHANNELS,
                "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
                "num_anchors": len(anchors.SIZES[0]) * len(anchors.ASPECT_RATIOS[0]),
                "pooler": cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION,
                "fc_dims": [cfg.MODEL.ROI_BOX_HEAD.FC_DIM] * cfg.MODEL.ROI_BOX_HEAD.NUM_FC,
                "num_proposals": cfg.MODEL.RPN.POST_NMS_TOPK_TEST,
            },
        }

    def cost(self, architecture: Architecture) -> int:
        """Multiply-adds C at the base resolution."""
        return total(self._cost(architecture, self.base_size, self._detector)).macs

    def __call__(self, architecture: Architecture, size: Size, ap: float) -> float:
        """H at one resolution (width, height)."""
        pixels = size[0] * size[1] / (self.base_size[0] * self.base_size[1])
        ratio = self.cost(architecture) / self._base_cost
        return score(ap, ratio, pixels, alpha=self.alpha, beta=self.beta)

    def best(self, architecture: Architecture, aps: Mapping[Size, float]) -> Best:
        """The largest H over all resolutions; of equal ones the first.

        Args:
            architecture: of the student.
            aps: (width, height) -> AP, at least one.
        """
        scores = [Best(self(architecture, size, ap), size) for size, ap in aps.items()]
        return max(scores, key=lambda entry: entry.score)
