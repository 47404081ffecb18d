"""Parts of detectors that have no configuration of their own."""

from .atss_assigner import ATSSAssigner, atss_candidates, atss_threshold
from .box_crop import crop_boxes
from .centerness import centerness
from .default_boxes import DefaultBoxGenerator
from .distribution import DistributionBox2BoxTransform
from .l2_norm import L2Norm
from .paired_iou import paired_iou
from .reduce import reduce_mean
from .scale import Scale
from .score_factor import apply_score_factor
from .ssd_matcher import SSDMatcher
from .topk import bounded_topk
from .valid_anchors import valid_anchor_mask

__all__ = [
    "ATSSAssigner",
    "DefaultBoxGenerator",
    "DistributionBox2BoxTransform",
    "L2Norm",
    "SSDMatcher",
    "Scale",
    "apply_score_factor",
    "atss_candidates",
    "atss_threshold",
    "bounded_topk",
    "centerness",
    "crop_boxes",
    "paired_iou",
    "reduce_mean",
    "valid_anchor_mask",
]
