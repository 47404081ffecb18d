"""Configuration of the distillation losses: ``KD.JOINTDETNAS``."""

from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES, add_schedule_config

__all__ = ["add_jointdetnas_config"]


@CONFIG_NODES.register()
def add_jointdetnas_config(cfg: CN) -> None:
    """Add ``KD.JOINTDETNAS``. "Paper" is the Joint-DetNAS paper, "ours" where it is silent."""
    cfg.KD.JOINTDETNAS = node = CN()
    node.FEAT = CN()
    # Weight of L_feat (Sec. 3.2.1), features of RoIs. Paper: the terms have no coefficients. 0.0:
    # off, here and below.
    node.FEAT.WEIGHT = 1.0
    # RoIs that it compares: "positive" (foreground) or "all" sampled ones. Ours: the paper
    # presents the term as attention to the foreground, and divides by its positive points.
    node.FEAT.ROIS = "positive"
    # Outputs of the adapter: the widest pyramid among all teachers of a search. Of a narrower
    # teacher the leading ones are compared. 0: the width of the teacher at hand. Ours: the
    # paper's pool has pyramids of up to 384 channels, its adapter 256.
    node.FEAT.ADAPTER_CHANNELS = 384
    node.CLS = CN()
    # Weight of L_cls (Sec. 3.2.2), the soft cross entropy.
    node.CLS.WEIGHT = 1.0
    node.REG = CN()
    # Weight of L_reg (Sec. 3.2.2).
    node.REG.WEIGHT = 1.0
    # Its form: "class_aware" (the method), or "gt_class", deltas of the labelled class of positive
    # RoIs (Table 12, "original").
    node.REG.MODE = "class_aware"
    add_schedule_config(node)
