"""Configuration node ``KD.CROSSKD``."""

from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES, add_schedule_config

__all__ = ["add_crosskd_config"]


@CONFIG_NODES.register()
def add_crosskd_config(cfg: CN) -> None:
    """Add ``KD.CROSSKD``. Values -1, -1.0 and "" mean: whatever ``PRESET`` says."""
    cfg.KD.CROSSKD = node = CN()
    # Where positions, weights, losses and normalisers that are not set below come from, per
    # detector: "official" (the authors' configs and code, crosskd.presets.OFFICIAL) or "paper"
    # (the same weights, but the paper's eq. 4 and 5 literally: regression on foreground only,
    # each loss divided by |S|, the size of its region).
    node.PRESET = "official"
    # Which predictions are compared with their target; several are added up.
    # "cross": behind the other network's head (Sec. 3.2); "mimic": the student's own predictions
    # (plain prediction mimicking, Tables 1, 3 and 4).
    node.MODES = ("cross",)
    # Fig. 6 and Table 10. "a" (the method): the student's feature through the teacher's head,
    # towards the teacher's prediction; "b", "c", "d": see crosskd.strategies.
    node.STRATEGY = "a"
    # i of Table 1: number of tower stages before the feature changes heads, 0 (pyramid) ..
    # number of stages; number of stages + 1 is "mimic". -1: preset (3; FCOS 2), which must lie
    # inside the towers.
    node.POSITION = -1
    # The same for one branch only; -1: POSITION.
    node.POSITION_CLS = -1
    node.POSITION_REG = -1
    # Feature that changes heads: "post_act" (after the ReLU, what the official code does because
    # its ReLU is in place) or "pre_act" (before it, as its source reads). The ReLU follows the
    # alignment in both cases.
    node.TAP = "post_act"
    # Alignment of the moved feature to the statistics of the feature it replaces: "official"
    # (mean and standard deviation per channel; in the code, not in the paper) or "none".
    node.ALIGN = "official"
    # Branches that are distilled (Table 3), subset of ("cls", "reg"). Centerness follows the
    # branch that predicts it.
    node.BRANCHES = ("cls", "reg")
    # "qfl" (eq. 4: |sigma - t|^gamma * BCE) or "bce" (Table 11).
    node.CLS_LOSS = "qfl"
    # gamma of eq. 4, 0 or at least 1.
    node.CLS_GAMMA = 1.0
    # Positions that are compared: "all", "pos" or "neg" of the student's assigner (Table 11).
    node.CLS_REGION = "all"
    # Weight of the classification term; -1.0: preset (1.0; FCOS 0.4).
    node.CLS_WEIGHT = -1.0
    # "kl" (distributions of GFL), "giou", "iou_log" (-ln IoU); "": preset (FCOS: "iou_log", or
    # "giou" where MODEL.FCOS.BOX_LOSS is giou, as in its preset "d2").
    node.REG_LOSS = ""
    # Temperature of "kl".
    node.REG_TAU = 1.0
    # Weight of a position in the regression term: "teacher" (highest class probability of the
    # teacher, the official code) or "fg" (1 at the positives of the student's assigner, S(r) of
    # eq. 5); "": preset ("teacher").
    node.REG_REGION = ""
    # Weight of the regression term; -1.0: preset (GFL 4.0, RetinaNet and ATSS 1.0, FCOS 0.75).
    node.REG_WEIGHT = -1.0
    # Weight of the centerness term; -1.0: preset (ATSS 1.0, otherwise 0: no such term).
    node.CTR_WEIGHT = -1.0
    # What the sums are divided by: "official" (per detector, crosskd.normalisers), "region" (|S|)
    # or "ema" (the detector's own moving average of positives, where it keeps one); "": preset.
    node.NORMALIZER = ""
    # False: gradients flow into the target as well, where it has any (strategies b and c). The
    # statistics that the alignment aims at are constants in both cases. Ours: the paper is silent.
    node.DETACH_TARGET = True
    add_schedule_config(node)
