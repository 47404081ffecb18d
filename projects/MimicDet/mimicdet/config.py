"""Configuration node ``MODEL.MIMICDET``; everything else is set through Detectron2's own keys."""

from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES, add_schedule_config

__all__ = ["add_mimicdet_config"]


@CONFIG_NODES.register()
def add_mimicdet_config(cfg: CN) -> None:
    """Add ``MODEL.MIMICDET``. "Ours": the paper is silent or ambiguous, and no code is public."""
    cfg.MODEL.MIMICDET = node = CN()
    # Head whose detections evaluation reports: "student" (the S-head, the one-stage detector that
    # is deployed) or "teacher" (the T-head on the same boxes, the T-head AP of Table 3; needs P2).
    node.EVAL_HEAD = "student"
    # Iterations between two records of cosines and offsets. Ours.
    node.LOG_PERIOD = 20
    # From this iteration on warn, once, if the offsets of the alignment are nearly the same in all
    # cells (spatial standard deviation below 0.01 cells): no box guides them. Ours.
    node.OFFSET_WARNING_ITER = 5000
    _add_refine(node)
    _add_heads(node)
    _add_mimic(node)
    # Distiller of a separate teacher; weight and options of its loss are MODEL.MIMICDET.MIMIC.
    cfg.KD.MIMICDETTEACHER = CN()
    add_schedule_config(cfg.KD.MIMICDETTEACHER)


def _add_refine(node: CN) -> None:
    node.REFINE = CN()
    # Range of sqrt(w * h) of the objects that a level is responsible for, in sides of its anchors:
    # [low, high). The finest level has no lower bound, the coarsest no upper one. Paper.
    node.REFINE.ETA = (1.0, 2.0)
    # Side of an anchor in cells of its level. Only a record: the sides themselves are
    # MODEL.ANCHOR_GENERATOR.SIZES, and another ratio there is an error. Paper (32 at P3).
    node.REFINE.BASE_SCALE = 4.0
    # Sides of the central part of an object, as share of its own, in which anchors are positive;
    # in (0, 1]. Paper.
    node.REFINE.CENTER_RATIO = 0.3
    # Initial probability of an object at every anchor, in (0, 1); 0.5 is a bias of zero. Ours.
    node.REFINE.PRIOR_PROB = 0.01
    # What the classification loss, a sum over all anchors, is divided by: "fixed"
    # (MODEL.RPN.BATCH_SIZE_PER_IMAGE = 256 per image, as in Detectron2's RPN), "num_pos" (positives
    # of the batch) or "mean" (all anchors). Ours.
    node.REFINE.CLS_NORM = "fixed"
    # What the regression loss, a sum over positives, is divided by: "num_pos" (positives, the mean
    # over processes, at least 1) or "fixed" (as above). Ours.
    node.REFINE.REG_NORM = "num_pos"
    # Give an object without any anchor (small ones, mainly) the one nearest to its centre on its
    # level. Ours; False is the paper.
    node.REFINE.FALLBACK_NEAREST = False

    node.PROPOSAL = CN()
    # Boxes that suppress each other in training: "joint" (all levels together) or "per_level".
    # Ours.
    node.PROPOSAL.NMS_SCOPE = "joint"


def _add_heads(node: CN) -> None:
    node.T_HEAD = CN()
    # False: a plain one-stage detector with refinement (Table 1, first row). Needs a
    # MODEL.FPN.IN_FEATURES without res2, which nothing would use, and MIMIC.WEIGHT 0.
    node.T_HEAD.ENABLED = True
    # "dual" (a branch each for classification and regression), "light" (2 fully connected layers)
    # or "heavy" (4 convolutions and 2 fully connected layers). Table 3.
    node.T_HEAD.VARIANT = "dual"
    # Level a box is pooled from: "origin" (entry i of MODEL.ROI_HEADS.IN_FEATURES for an anchor of
    # entry i of MODEL.RPN.IN_FEATURES) or "area" (Detectron2's rule). Ours, read from Sec. 3.3.
    node.T_HEAD.LEVEL_ASSIGN = "origin"
    # As S_HEAD.PRIOR_PROB.
    node.T_HEAD.PRIOR_PROB = 0.0

    node.S_HEAD = CN()
    # False: only the two-stage detector is trained (the separate teacher of Table 5). Needs
    # MIMIC.WEIGHT 0 and EVAL_HEAD "teacher".
    node.S_HEAD.ENABLED = True
    # Alignment of features with the adjusted boxes: "conv", "deform", "guided" (Table 2) or
    # "roiconv" (taps spread over the box, nothing to learn; ours).
    node.S_HEAD.ALIGN = "guided"
    # Kernel size of the alignment per level, odd. Paper, Table 2 (d); (a) to (c) have 5 throughout.
    # Levels with equal size share their layers.
    node.S_HEAD.KERNELS = (3, 5, 5, 5, 5)
    # Channels of the two feature vectors of a box. Those of the T-head are
    # MODEL.ROI_BOX_HEAD.FC_DIM and must be as many when there is a mimic loss. Paper.
    node.S_HEAD.FEAT_DIM = 1024
    # Initial weights of alignment and feature layers: "gaussian", N(0, 0.01) (paper), or "he",
    # N(0, sqrt(2 / fan_in)), or "xavier", variance 1 / fan_in, as the T-head's (both ours, for
    # narrow networks: from the pyramid to the logits the first one shrinks the scale about 50 times
    # at the paper's widths, about 400 times at a quarter of them).
    node.S_HEAD.INIT = "gaussian"
    # Initial probability of an object of any class, in [0, 1), by the bias of the background's
    # logit; 0: that bias starts from 0 (paper), all K + 1 answers alike. In short runs neither head
    # learnt classes from there, both did from 0.25, the share of positives.
    node.S_HEAD.PRIOR_PROB = 0.0
    # Standard deviation of the initial weights of the offset micro-network. Paper: 0.01, with which
    # offsets may hardly leave zero; 0.1 is the alternative (the analogous layer of mmdet).
    node.S_HEAD.OFFSET_INIT_STD = 0.01
    # Where the micro-network starts: "gaussian" (paper), or "box" (ours), with weights that spread
    # the taps over the adjusted box, from where they are learnt.
    node.S_HEAD.OFFSET_INIT = "gaussian"
    # Factor of the gradient at the micro-network's offsets, hence of its learning rate. Paper: 1.
    # From "box" it needs about 0.1, or the first iterations move the taps off the boxes again.
    node.S_HEAD.OFFSET_LR_FACTOR = 1.0
    # False: gradients flow through the offsets into the refinement's regression. Ours.
    node.S_HEAD.DETACH_DELTAS = True
    # Boxes per image in the classification loss, those with the largest cross-entropy. Paper.
    node.S_HEAD.CLS_TOPK = 128
    # Largest number of positives per image in the regression loss. Paper.
    node.S_HEAD.MAX_POS_REG = 64
    # Run the 1x1 layers on the kept boxes only; False: on all cells first. Equal results. Ours.
    node.S_HEAD.GATHER_FIRST = True


def _add_mimic(node: CN) -> None:
    node.MIMIC = CN()
    # Factor of the mimic loss; 0: it is not computed. Paper: 1.
    node.MIMIC.WEIGHT = 1.0
    # Further factors of its two terms, where the heads have two branches. Ours.
    node.MIMIC.CLS_WEIGHT = 1.0
    node.MIMIC.REG_WEIGHT = 1.0
    # Boxes of the T-head that are compared: "all" (paper) or "objects", those that are no
    # background.
    node.MIMIC.BOXES = "all"
    # What the classification branch mimics: "logits" (before the softmax, background included) or
    # "feature" (the vector the logits come from). Paper: logits, by its explicit statement.
    node.MIMIC.CLS_TARGET = "logits"
    # Feature vectors compared: "post_relu" (what the predictors see) or "pre_relu". Ours.
    node.MIMIC.FEATURE_POINT = "post_relu"
    # False: the mimic loss also moves the T-head towards the S-head. Ours.
    node.MIMIC.DETACH_TEACHER = True
    # Most of these boxes of an image, drawn at random; -1: all (paper).
    node.MIMIC.NUM_SAMPLES = -1
    # Smallest norm of a vector in the cosine; it bounds the gradient at zero vectors. Ours.
    node.MIMIC.EPS = 0.01
    # Ours. Of the T-head on the student's backbone; a separate teacher has KD.MIMICDETTEACHER.
    add_schedule_config(node.MIMIC)

    node.TEACHER = CN()
    # "shared" (the T-head lies on the student's backbone) or "separate" (a frozen MimicDet with its
    # own backbone, read through KD.TEACHER and KD.DISTILLERS ("MimicDetTeacher",); Table 5).
    node.TEACHER.MODE = "shared"
