"""Configuration node ``KD.DICOD``."""

from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES, add_schedule_config

__all__ = ["add_dicod_config"]


@CONFIG_NODES.register()
def add_dicod_config(cfg: CN) -> None:
    """Add ``KD.DICOD``. "Paper" is the DICOD paper (arXiv 2106.05209), "ours" a decision.

    The teacher is ``KD.TEACHER`` with the type "ClassifierTeacher"; none is needed, built or read
    when neither CLS nor the feature term of LOC is on.
    """
    cfg.KD.DICOD = node = CN()
    # Distillation of the classification (Sec. 3.1): the student's classes on its positives against
    # the classifier's on the crops of their ground-truth boxes.
    node.CLS = CN()
    node.CLS.ENABLED = True
    # lambda_kc of eq. 12. 0.0: no such term. Paper: 0.4 for all students.
    node.CLS.WEIGHT = 0.4
    # Temperature T of eqs. 2 to 7, above 0; both sides. Paper: 2 for all students.
    node.CLS.T = 2.0
    # Name in CLS_MODES: "SoftmaxKL" (eqs. 2 to 4; SSD, R-CNN), "BinaryKL" (eqs. 5 to 7; sigmoids),
    # "SigmoidL1KL" (sigmoids divided by their sum; not in the paper, blind to a common factor),
    # "ForegroundSoftmaxKL" (SSD, R-CNN: softmaxes without the background; ours), or "auto":
    # SoftmaxKL for a softmax with background, BinaryKL for sigmoids.
    node.CLS.MODE = "auto"

    # Distillation of the localisation (Sec. 3.2): crops of predicted boxes against those of their
    # ground-truth boxes.
    node.LOC = CN()
    node.LOC.ENABLED = True
    # Side of the crops, pixels. Paper: 112; 56 costs 0.2 AP on SSD300.
    node.LOC.SAMPLE_SIZE = 112
    # lambda_l of eq. 12, on the pixels of the crops (eq. 11); needs no teacher. 0.0: no such term.
    # Unit: that of the student's normalised images. SSD's have a standard deviation of 1, i.e. the
    # term counts grey levels of 0..255, for which 0.15 is the paper's; where pixels are divided
    # by about 57, the term is 57 times smaller, no value is published, and 0.15, 1 and 5 are worth
    # a try.
    node.LOC.OBJ_WEIGHT = 0.15
    # Pixels are pooled to this many cells a side, at most SAMPLE_SIZE. Paper: 4 or 8 by student, 4
    # for SSD300.
    node.LOC.OBJ_POOL = 4
    # lambda_kl of eq. 12, on early features of the classifier (eq. 10). 0.0: no such term.
    # Paper: 0.15 for SSD300.
    node.LOC.FEAT_WEIGHT = 0.15
    # Layers of the classifier that are compared, averaged: any of "stem" (l0, behind the
    # max-pooling), "layer1" to "layer4". Paper: the stem; deeper layers cost AP.
    node.LOC.FEAT_LAYERS = ["stem"]
    # Cells a side to which each of them is pooled, at most the side of its map: a 4th of
    # SAMPLE_SIZE for the stem and layer1, then an 8th, 16th and 32nd. Paper: 4 or 8, 8 for SSD300.
    node.LOC.FEAT_POOLS = [8]
    # Crops that pass the classifier together; it bounds the memory, not the value. Published: 256.
    node.LOC.CHUNK = 256
    add_schedule_config(node)
