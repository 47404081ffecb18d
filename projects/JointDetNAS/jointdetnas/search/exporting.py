"""Configs of a searched student: its evaluation, and its fine-tuning (Table 9)."""

import os

from detectron2.config import CfgNode

from kd_d2.checkpoint import load_yaml_config
from kd_d2.config import get_cfg

from .candidate import Candidate

__all__ = ["finetune_config", "trial_config"]


def trial_config(candidate: Candidate) -> CfgNode:
    """Config of a candidate, tested at the resolution that has its score."""
    cfg = get_cfg()
    load_yaml_config(cfg, candidate.config)
    cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST = candidate.result()["size"]
    return cfg


def finetune_config(cfg: CfgNode, candidate: Candidate, weights: str, folder: str) -> CfgNode:
    """Config of the training after the search: 16 epochs, a cosine from 0.01, the last teacher.

    Args:
        cfg: of the search; ``SEARCH.FINETUNE`` is read.
        weights: of the exported student.
        folder: of the export; the run goes below it.
    """
    node = cfg.SEARCH.FINETUNE
    cfg = trial_config(candidate)
    cfg.MODEL.WEIGHTS = os.path.abspath(weights)
    cfg.OUTPUT_DIR = os.path.join(folder, "finetune")
    cfg.SOLVER.IMS_PER_BATCH = node.IMS_PER_BATCH
    cfg.SOLVER.MAX_ITER = node.MAX_ITER
    cfg.SOLVER.BASE_LR = node.BASE_LR
    return cfg
