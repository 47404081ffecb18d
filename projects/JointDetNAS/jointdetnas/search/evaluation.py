"""Fast evaluation of one candidate: training with its teacher, then AP at every resolution."""

import logging
import math
import os
import time
from typing import Any, Dict, List, Optional, Tuple, Type

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from kd_d2.checkpoint import load_checkpoint_file, load_weights, load_yaml_config
from kd_d2.config import get_cfg

from ..cost import Cost, backbone_cost, detector_cost, total
from ..elastic_config import pool_of
from ..extraction import as_subnet
from ..morph_resnet import config_architecture
from ..score import StudentScore
from ..space import Architecture
from ..surgery import bottom_up_of
from .candidate import Candidate, read_json, write_json
from .course import Course
from .proposal import Proposal
from .students import pool_config, write_student

__all__ = ["detector_options", "evaluate", "prepare", "resolutions", "summary"]

logger = logging.getLogger(__name__)

Size = Tuple[int, int]


def resolutions(cfg: CfgNode) -> List[Size]:
    """``SEARCH.SCORE.SIZES`` as (long, short) pairs.

    Raises:
        ValueError: there is none, or one is no pair of positive numbers.
    """
    sizes = [tuple(size) for size in cfg.SEARCH.SCORE.SIZES]
    if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(
            "SEARCH.SCORE.SIZES must be pairs (long, short) of positive numbers of pixels, got "
            f"{cfg.SEARCH.SCORE.SIZES}"
        )
    return [(int(max(size)), int(min(size))) for size in sizes]


def prepare(cfg: CfgNode, course: Course, number: int) -> CfgNode:
    """Make the student of a trial, in a single process; return the candidate's config.

    Nothing is done that was done before.

    Args:
        cfg: of the search.
    """
    candidate = course.candidate(number)
    if not candidate.has(candidate.student) and not candidate.has(candidate.config):
        proposal = candidate.spec()
        parent = None if proposal.parent is None else course.candidate(proposal.parent)
        store = os.path.join(os.path.abspath(course.folder), "teachers")
        course.method.make_student(cfg, proposal, candidate, parent, store)
    own = get_cfg()
    load_yaml_config(own, candidate.config)
    own.freeze()
    return own


def evaluate(cfg: CfgNode, own: CfgNode, candidate: Candidate, trainer: Type[DefaultTrainer]):
    """Train and evaluate a prepared candidate, on all ranks, and write its result.

    Whatever an earlier call that was killed has finished is not done again.

    Args:
        cfg: of the search.
        own: of the candidate.
        trainer: class of trainers; ``KDTrainer``.
    """
    _start(own)
    if not _shared(candidate.has(candidate.student)):
        _train(own, candidate, trainer)
    model = trainer.build_student(own)
    extra = load_weights(model, candidate.student)
    for size in resolutions(cfg):
        path = candidate.path(f"eval_{size[0]}x{size[1]}.json")
        if _shared(candidate.has(path)):
            continue
        started = time.time()
        metrics = _metrics(trainer.test(_at(own, size), model))
        if comm.is_main_process():
            seconds = time.time() - started
            write_json(path, {"size": size, "metrics": metrics, "seconds": seconds})
    if comm.is_main_process():
        architecture = bottom_up_of(model).architecture
        arch = architecture.entry(own.MODEL.FPN.OUT_CHANNELS)
        candidate.write_result(
            {**summary(cfg, own, candidate, architecture), "arch": arch, **extra["training"]}
        )
    comm.synchronize()


def _start(own: CfgNode) -> None:
    for name in ("fvcore", "detectron2", "kd_d2"):
        setup_logger(own.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name)
    seed_all_rng(own.SEED + comm.get_rank())
    torch.backends.cudnn.benchmark = own.CUDNN_BENCHMARK


def _shared(value: bool) -> bool:
    """What the main process saw; files may appear while ranks look for them."""
    return comm.all_gather(value)[0]


def _at(own: CfgNode, size: Size) -> CfgNode:
    cfg = own.clone()
    cfg.defrost()
    cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST = size
    cfg.OUTPUT_DIR = os.path.join(own.OUTPUT_DIR, f"eval_{size[0]}x{size[1]}")
    return cfg


def _metrics(results) -> Dict[str, Any]:
    """Box metrics; NaN as None, which every JSON reader knows."""
    metrics = dict(results.get("bbox", {}))
    return {k: v if math.isfinite(v) else None for k, v in metrics.items()}


def _train(own: CfgNode, candidate: Candidate, trainer_class: Type[DefaultTrainer]) -> None:
    if comm.is_main_process() and own.SEARCH.RESUME == "restart":
        candidate.remove_checkpoints()
    comm.synchronize()
    cfg = own.clone()
    cfg.defrost()
    # it is evaluated afterwards, at every resolution
    cfg.DATASETS.TEST, cfg.TEST.EVAL_PERIOD = (), 0
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=True)
    if trainer.start_iter == 0:
        _inherit_distillers(trainer, candidate)
    if trainer.start_iter < trainer.max_iter:
        trainer.train()
    if comm.is_main_process():
        body = bottom_up_of(trainer.student)
        body.architecture = body.architecture.older()
        images = trainer.max_iter * own.SOLVER.IMS_PER_BATCH
        training = {
            "iterations": trainer.max_iter,
            "epochs": images / trainer.data_loader.num_images,
        }
        entries = {"training": training}
        if trainer.kd_model is not None:
            state = trainer.kd_model.distillers.state_dict()
            entries["distillers"] = {name: value.cpu() for name, value in state.items()}
        write_student(trainer.student, candidate.student, own, **entries)
        candidate.remove_checkpoints()
    comm.synchronize()


def _inherit_distillers(trainer: DefaultTrainer, candidate: Candidate) -> None:
    """A run that begins loads the student only; adapters come from the parent here."""
    state = load_checkpoint_file(candidate.init).get("distillers")
    if state is not None and trainer.kd_model is not None:
        trainer.kd_model.distillers.load_state_dict(state)
        logger.info(f"Distillers start as those of the parent: {len(state)} tensors")


# -------------------------------------------------------------------------------------- result
def detector_options(cfg: CfgNode) -> Dict[str, Any]:
    """Arguments of :func:`detector_cost` that are the same for all students of a search."""
    model = cfg.MODEL
    return {
        "fpn": model.FPN.OUT_CHANNELS,
        "num_classes": model.ROI_HEADS.NUM_CLASSES,
        "num_anchors": len(model.ANCHOR_GENERATOR.ASPECT_RATIOS[0])
        * len(model.ANCHOR_GENERATOR.SIZES[0]),
        "pooler": model.ROI_BOX_HEAD.POOLER_RESOLUTION,
        "fc_dims": (model.ROI_BOX_HEAD.FC_DIM,) * model.ROI_BOX_HEAD.NUM_FC,
        "num_proposals": model.RPN.POST_NMS_TOPK_TEST,
    }


def summary(
    cfg: CfgNode, own: CfgNode, candidate: Candidate, architecture: Architecture
) -> Dict[str, Any]:
    """The content of ``result.json`` but for ``arch`` and the training.

    ``score`` is None if an AP is missing.

    Args:
        cfg: of the search.
        own: of the candidate.
        architecture: of its student.
    """
    proposal = candidate.spec()
    score = StudentScore(cfg, config_architecture(cfg))
    sizes = [_at_size(own, candidate, architecture, score, size) for size in resolutions(cfg)]
    scores = [entry["score"] for entry in sizes]
    best: Optional[Dict[str, Any]] = None
    if None not in scores:
        best = max(sizes, key=lambda entry: entry["score"])
    modules = backbone_cost(architecture, score.base_size)
    return {
        **proposal.to_dict(),
        "score": best and best["score"],
        "size": best and best["size"],
        "AP": best and best["AP"],
        "sizes": sizes,
        "macs": {name: cost.macs for name, cost in modules.items()},
        "parameters": total(modules).parameters,
        "teacher_parameters": _teacher_parameters(cfg, proposal),
    }


def _at_size(
    own: CfgNode, candidate: Candidate, architecture: Architecture, score: StudentScore, size: Size
) -> Dict[str, Any]:
    measured = read_json(candidate.path(f"eval_{size[0]}x{size[1]}.json"))
    ap = measured["metrics"].get("AP")
    cost: Cost = total(detector_cost(architecture, size, **detector_options(own)))
    return {
        "size": size,
        "AP": ap,
        "score": None if ap is None else score(architecture, size, ap),
        "macs": cost.macs,
        "flops": cost.flops,
    }


def _teacher_parameters(cfg: CfgNode, proposal: Proposal) -> Optional[int]:
    """Of the backbone of a teacher from the pool."""
    pool_cfg = pool_config(cfg)
    if pool_cfg is None:
        return None
    architecture = pool_of(pool_cfg)[0].architecture(as_subnet(proposal.teacher, pool_cfg))
    return total(backbone_cost(architecture, (64, 64))).parameters
