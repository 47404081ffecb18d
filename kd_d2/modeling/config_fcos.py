"""Configuration keys of FCOS.

"Paper" is the FCOS baseline of CrossKD (mmdetection's plain FCOS; Tian et al., ICCV 2019), "d2"
the improved FCOS that Detectron2 ships as a lazy config.
"""

from detectron2.config import CfgNode as CN

__all__ = ["add_fcos_config"]


def add_fcos_config(cfg: CN) -> None:
    """Add ``MODEL.FCOS``, read by :class:`kd_d2.modeling.meta_arch.FCOS`.

    ``PRESET`` gives every switch whose value is None (``null`` in YAML) its value; a switch that
    is set wins over the preset. Thus "paper" with ``BOX_LOSS: giou`` is the paper's FCOS with
    another box loss. With PRESET "custom" every switch has to be set.
    """
    node = cfg.MODEL.FCOS = CN()
    # Number of foreground classes K; the background has index K. 80: COCO.
    node.NUM_CLASSES = 80
    # Pyramid levels the head runs on, finest first. The ranges of object sizes are 8 strides of
    # the level, so that 5 levels from stride 8 on give the paper's 64, 128, 256, 512.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Stages (3x3 conv, norm, ReLU) of each of the two towers. Paper and d2: 4.
    node.NUM_CONVS = 4
    # Width of the tower stages in channels; 0: as many as the pyramid levels have. Both: 256.
    node.CONV_DIM = 0
    # Normalisation after each tower conv: "" (none), "GN" (32 groups) or another name of
    # detectron2.layers.get_norm. Paper and d2: "GN".
    node.NORM = "GN"
    # Score of every class that the freshly initialised head gives everywhere, in (0, 1).
    # Both: 0.01.
    node.PRIOR_PROB = 0.01
    # Weight of positives in the focal loss, negatives have 1 - alpha; negative: no weighting.
    # Both: 0.25.
    node.FOCAL_LOSS_ALPHA = 0.25
    # Exponent of the modulating factor of the focal loss, >= 0. Both: 2.
    node.FOCAL_LOSS_GAMMA = 2.0
    # Highest-scoring candidates kept per level before NMS. Both: 1000.
    node.TOPK_CANDIDATES_TEST = 1000
    # Above 0: boxes are distributions over distances as in GFL, with so many strides as the largest
    # (NORM_BY_STRIDE is not used), for localisation distillation; LD has 16. Both: 0, distances.
    node.REG_MAX = 0
    # Weight of the distribution focal loss, with REG_MAX above 0; GFL's value (unverified for
    # FCOS).
    node.DFL_LOSS_WEIGHT = 0.25

    # Values of the switches below that are None: "paper", "d2", or "custom" (none may be None).
    node.PRESET = "paper"

    # Switches. Tower that feeds the centerness: "cls", "reg" or "none" (no centerness at all).
    # paper "cls", d2 "reg".
    node.CENTERNESS_ON = None
    # True: distances are relu(x) * stride; False: exp(x) pixels. paper False, d2 True.
    node.NORM_BY_STRIDE = None
    # One learnable factor per level after the box predictor. paper True, d2 False.
    node.USE_SCALE = None
    # Bias in tower convs that a norm follows (those without norm always have one).
    # paper False, d2 True.
    node.CONV_BIAS = None
    # Positions farther than this many strides (in x or y) from the centre of a box are no
    # positives; 0: no such restriction. paper 0, d2 1.5.
    node.CENTER_RADIUS = None
    # "paper": level ranges include their ends, the smallest box wins. "d2": ranges exclude their
    # ends, and areas are compared as fp32 values of 1e8 - area, so that of boxes whose areas
    # differ by less than about 8 pixels^2 the first wins.
    node.MATCHER = None
    # "iou": -ln IoU; "giou": 1 - GIoU. paper "iou", d2 "giou".
    node.BOX_LOSS = None
    # Weight the box loss of a position by its centerness target and divide by the sum of these
    # weights instead of the normaliser. paper True, d2 False.
    node.CTR_WEIGHTED_BOX = None
    # What the losses are divided by: "count", the number of positives of this batch, averaged
    # over ranks, at least 1; "ema", its running mean on this rank (momentum 0.9, start 300).
    # paper "count", d2 "ema".
    node.NORMALIZER = None
    # Score of a detection. "mul": class score times centerness, thresholded and ranked before NMS
    # by the class score; "sqrt": square root of that product, also for threshold and rank.
    # With CENTERNESS_ON "none" both are the class score. paper "mul", d2 "sqrt".
    node.SCORE_MODE = None
    # Candidates need a score above this, in [0, 1]. paper 0.05, d2 0.2.
    node.SCORE_THRESH_TEST = None
    # Of two detections of one class whose IoU exceeds this the weaker is dropped.
    # paper 0.5, d2 0.6.
    node.NMS_THRESH_TEST = None
