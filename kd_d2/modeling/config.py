"""Configuration keys of the detectors: ``MODEL.GFL`` and ``MODEL.ATSS``, and those of the
neighbouring files :mod:`config_backbones`, :mod:`config_fcos` and :mod:`config_ssd`.

"Official" below is the setting with which GFL (Li et al., NeurIPS 2020) and ATSS (Zhang et al.,
CVPR 2020) are trained in the 12-epoch COCO baselines that CrossKD builds on.
"""

from detectron2.config import CfgNode as CN

from .config_backbones import add_backbone_config
from .config_fcos import add_fcos_config
from .config_ssd import add_ssd_config

__all__ = ["add_modeling_config", "add_gfl_config", "add_atss_config"]


def add_modeling_config(cfg: CN) -> None:
    """Add the nodes of all detectors and backbones of this library to ``cfg``."""
    add_backbone_config(cfg)
    add_gfl_config(cfg)
    add_atss_config(cfg)
    add_fcos_config(cfg)
    add_ssd_config(cfg)


def _single_anchor_node() -> CN:
    """Keys that GFL and ATSS have in common: head, anchors, assignment, inference."""
    node = CN()
    # Number of foreground classes K; the background has index K. 80: COCO.
    node.NUM_CLASSES = 80
    # Pyramid levels the head runs on, finest first.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Stages (3x3 conv, norm, ReLU) of each of the two towers; n_conv of CrossKD. Official: 4.
    node.NUM_CONVS = 4
    # Width of the tower stages in channels; 0: as many as the pyramid levels have. Official: 256.
    node.CONV_DIM = 0
    # Normalisation after each tower conv: "" (none, convs then have a bias), "GN" (32 groups,
    # the width must be a multiple of 32; at 32 each group is one channel, and torch refuses a
    # batch of one image whose coarsest level is 1x1) or another name of
    # detectron2.layers.get_norm. Statistics of BN variants would be shared by all levels.
    # Official: "GN".
    node.NORM = "GN"
    # Score of every class that the freshly initialised head gives everywhere, in (0, 1);
    # pi of the focal loss paper. Official: 0.01.
    node.PRIOR_PROB = 0.01
    # Side of the one square anchor per cell, in strides of its level. Official: 8.
    node.ANCHOR_SCALE = 8.0
    # Candidates that ATSS takes per ground-truth box and level; k of ATSS. Official: 9.
    node.ATSS_TOPK = 9
    # Detections need a class score above this; probability in [0, 1]. Official: 0.05.
    node.SCORE_THRESH_TEST = 0.05
    # Highest-scoring detections kept per level before NMS. Official: 1000.
    node.TOPK_CANDIDATES_TEST = 1000
    # Of two detections of one class whose IoU exceeds this the weaker is dropped. Official: 0.6.
    node.NMS_THRESH_TEST = 0.6
    return node


def add_gfl_config(cfg: CN) -> None:
    """Add ``MODEL.GFL``, read by :class:`kd_d2.modeling.meta_arch.GFL`."""
    node = cfg.MODEL.GFL = _single_anchor_node()
    # Largest distance from the anchor centre to a box side that a side's distribution can
    # express, in strides; n of GFL eq. 5. A side has REG_MAX + 1 bins. Official: 16.
    node.REG_MAX = 16
    # Exponent of the modulating factor |sigma - y| of the quality focal loss, 0 or >= 1; beta of
    # GFL eq. 4. Official: 2.
    node.QFL_BETA = 2.0
    # Weight of the quality focal loss. Official: 1.
    node.CLS_LOSS_WEIGHT = 1.0
    # Weight of the GIoU loss of the decoded boxes; lambda_0 of GFL eq. 8. Official: 2.
    node.GIOU_LOSS_WEIGHT = 2.0
    # Weight of the distribution focal loss; lambda_1 of GFL eq. 8. Official: 0.25.
    node.DFL_LOSS_WEIGHT = 0.25


def add_atss_config(cfg: CN) -> None:
    """Add ``MODEL.ATSS``, read by :class:`kd_d2.modeling.meta_arch.ATSS`."""
    node = cfg.MODEL.ATSS = _single_anchor_node()
    # Factors of (dx, dy, dw, dh), i.e. one over their standard deviations. Official: stds
    # (0.1, 0.1, 0.2, 0.2).
    node.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    # Above 0: boxes are distributions over distances as in GFL, with so many strides as the largest
    # (BBOX_REG_WEIGHTS is not used), for localisation distillation; LD has 16. Official: 0, deltas.
    node.REG_MAX = 0
    # Weight of the distribution focal loss, with REG_MAX above 0; GFL's value (unverified for
    # ATSS).
    node.DFL_LOSS_WEIGHT = 0.25
    # Weight of positives in the focal loss, negatives have 1 - alpha; in [0, 1], negative for no
    # weighting. Official: 0.25.
    node.FOCAL_LOSS_ALPHA = 0.25
    # Exponent of the modulating factor of the focal loss, >= 0. Official: 2.
    node.FOCAL_LOSS_GAMMA = 2.0
    # Weight of the focal loss. Official: 1.
    node.CLS_LOSS_WEIGHT = 1.0
    # Weight of the GIoU loss of the decoded boxes. Official: 2.
    node.GIOU_LOSS_WEIGHT = 2.0
    # Weight of the binary cross-entropy of the centerness. Official: 1.
    node.CTR_LOSS_WEIGHT = 1.0
