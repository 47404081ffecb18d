"""Configuration node ``KD.GDETKD``."""

from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES, add_schedule_config

__all__ = ["add_gdetkd_config"]


@CONFIG_NODES.register()
def add_gdetkd_config(cfg: CN) -> None:
    """Add ``KD.GDETKD``. "Paper" is the G-DetKD paper, "ours" a decision where it is silent.

    Head transfer is ``KD.INIT_STUDENT``, the teacher ``KD.TEACHER``, the linear warm-up of all
    weights ``KD.GDETKD.SCHEDULE.WARMUP_ITERS``.
    """
    cfg.KD.GDETKD = node = CN()
    # For a cascade teacher of a student without cascade, or the reverse: the stage (0-based) of
    # the teacher whose head sees the student's boxes. Stages of two cascades are paired. Ours.
    node.TEACHER_STAGE = 0
    _add_features(node)
    _add_ckd(node)
    _add_predictions(node)
    _add_students(node)
    add_schedule_config(node)


def _add_features(node: CN) -> None:
    node.FEAT = CN()
    # Feature term, a name in FEATURE_TERMS: "sgfi" (the method), "roifi" (one level by size),
    # the masks of Table 6 "whole", "anchor_mask", "gaussian_mask", "gt_mask", or "none".
    node.FEAT.MODE = "sgfi"
    # Its weight; -1.0: 1.0 (the equations have no coefficient), for the masks 0.01 (FGFI's code).
    node.FEAT.WEIGHT = -1.0
    # The three masks drawn from ground truth: a box is on "all" levels, or on the one of its size
    # ("fpn", as DeFeat does). Ours.
    node.FEAT.LEVEL_ASSIGN = "all"
    # Masks: a ReLU behind the 3x3 adapter, as in FGFI's code.
    node.FEAT.ADAPT_RELU = False

    node.SGFI = CN()
    # Student's pyramid levels that are pooled: "all" (P2-P6, of dense students P3-P7), or names of
    # levels separated by commas, e.g. "p3,p4". Paper: all.
    node.SGFI.STUDENT_LEVELS = "all"
    # RoIs: "positive" (foreground ones) or "all" sampled ones. Ours: the paper can be read both
    # ways. Also for "roifi".
    node.SGFI.ROIS = "positive"
    # Channels of the keys, C_key of eq. 1. Ours.
    node.SGFI.KEY_DIM = 128
    # Start value of the learnable temperature tau of eq. 1, dimensionless; 0: sqrt(KEY_DIM). Ours.
    node.SGFI.TAU_INIT = 0.0
    # Sampling points per bin side of the student's RoIAlign; 0: adaptive, unbounded in memory for
    # large boxes on fine levels. Ours.
    node.SGFI.SAMPLING_RATIO = 4
    # RoIs per chunk; chunks are recomputed in the backward pass, which bounds memory. 0: off.
    node.SGFI.CHUNK = 0
    # Random subset of at most so many RoIs an image, bounds memory; 0: all of them. Ours.
    node.SGFI.MAX_ROIS_PER_IMAGE = 128


def _add_ckd(node: CN) -> None:
    node.CKD = CN()
    # Contrastive distillation (Sec. 3.3).
    node.CKD.ENABLED = True
    # Its weight (paper: no coefficient).
    node.CKD.WEIGHT = 1.0
    # K, rows of the memory queue of each cascade stage, the current batch of all ranks included:
    # at least SOLVER.IMS_PER_BATCH times the RoIs of an image. Paper: 80 * 1024.
    node.CKD.QUEUE_SIZE = 81920
    # Type of the stored rows: "float32" or "float16" (half the memory, advisable for cascades).
    node.CKD.QUEUE_DTYPE = "float32"
    # Temperature gamma of eq. 2. Ours, MoCo's.
    node.CKD.GAMMA = 0.07
    # Width of the projection f_theta. Ours, that of MoCo and CRD.
    node.CKD.DIM = 128
    # "linear", or "mlp" with one hidden layer (Table 11 finds it worse).
    node.CKD.PROJ = "linear"
    # RoIs of the same image with a larger IoU are no negatives of each other; 1.0: all are
    # (Table 10: 0.5).
    node.CKD.IOU_THR = 0.5
    # RoIs: "all" sampled ones or "positive". Ours.
    node.CKD.ROIS = "all"
    # Whether f_theta gets gradient through the negatives as well, as eq. 2 reads.
    node.CKD.GRAD_THROUGH_QUEUE = True
    # Student's rows per chunk of the similarity matrix, recomputed in the backward pass; 0: off.
    node.CKD.CHUNK = 256
    # Representation of a dense student: input of the classification's output layer ("cls"), of the
    # box regression's ("loc"), or their "sum" (Table 12: cls).
    node.CKD.DENSE_BRANCH = "cls"


def _add_predictions(node: CN) -> None:
    node.CLS = CN()
    # Weight of the soft cross entropy of two-stage students, or of HETERO_PRED.CLS. 0.0: no such
    # term; -1.0: 1.0 for two-stage students, 0.0 for dense ones without HETERO_PRED.CLS.
    node.CLS.WEIGHT = -1.0

    node.REG = CN()
    # Regression of two-stage students: "caware" (eq. 3, class-specific heads), "fg_weighted" (eq. 3
    # where a head is class-agnostic), "gt_class" (Table 13 "N": positives, deltas of the labelled
    # class) or "off". "": "caware", "fg_weighted" if a head is class-agnostic, "off" for dense
    # students.
    node.REG.MODE = ""
    # Its weight, or that of HETERO_PRED.REG (paper: no coefficient).
    node.REG.WEIGHT = 1.0

    # Appendix D, RetinaNet only.
    node.HETERO_PRED = CN()
    # Classification of the student's boxes: "max_norm" (the paper's), "bce" (ours) or "off".
    node.HETERO_PRED.CLS = "off"
    # Regression of the positive ones: "l1" (ours: the paper has no formula) or "off".
    node.HETERO_PRED.REG = "off"


def _add_students(node: CN) -> None:
    # RoIs of dense students: boxes of their own predictions. Ours, like the RPN's sampler.
    node.DENSE = CN()
    # Boxes an image.
    node.DENSE.NUM_SAMPLES = 512
    # Largest part of them that is foreground.
    node.DENSE.POS_FRACTION = 0.25
    # Smallest IoU of a foreground box with its ground truth.
    node.DENSE.POS_IOU = 0.5
    # True: at most (1 - POS_FRACTION) / POS_FRACTION background boxes a foreground box instead of
    # filling up to NUM_SAMPLES.
    node.DENSE.STRICT_RATIO = False

    node.CASCADE = CN()
    # Stages of a cascade student that take part in CKD; those that it does not have are ignored.
    # Every stage has the factor 1 / number of stages, as in Detectron2's cascade. Ours.
    node.CASCADE.CKD_STAGES = (0, 1, 2)
