"""Where the student of a candidate comes from: its parent's weights, or the pool."""

from typing import Any, Dict, Optional

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import nn

from kd_d2.checkpoint import (
    architecture_entry,
    atomic_save,
    atomic_write,
    load_checkpoint_file,
    load_weights,
)
from kd_d2.data import build_train_loader
from kd_d2.distillation import TEACHER_REGISTRY, DetectorTeacher

from ..evolve import StudentMorphism, calibration_images
from ..extraction import CalibrationBatches, extract, recalibrate
from ..morph_resnet import config_architecture
from ..presets import config_text
from ..space import Architecture
from ..subnet import Subnet
from ..surgery import bottom_up_of
from ..teacher import ElasticTeacher
from .candidate import Candidate
from .proposal import Proposal

__all__ = [
    "candidate_seed",
    "inherit",
    "pool_config",
    "stored_architecture",
    "take_from_pool",
    "write_student",
]


def pool_config(cfg: CfgNode) -> Optional[CfgNode]:
    """Config of the elastic pool that teaches; None if none does."""
    name = cfg.KD.TEACHER.TYPE
    known = name in TEACHER_REGISTRY and issubclass(TEACHER_REGISTRY.get(name), ElasticTeacher)
    return DetectorTeacher.load_config(cfg) if cfg.KD.ENABLED and known else None


def candidate_seed(cfg: CfgNode, number: int) -> int:
    """``SEED`` of the training of a trial."""
    return 1000 * cfg.SEED + number


def candidate_config(
    cfg: CfgNode, architecture: Architecture, proposal: Proposal, candidate: Candidate, store: str
) -> CfgNode:
    """Config of one candidate's training and evaluation: that of the search, with its own pair."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = candidate_seed(cfg, proposal.number)
    cfg.OUTPUT_DIR = candidate.folder
    cfg.MODEL.WEIGHTS = candidate.init
    cfg.MODEL.MORPH_RESNET.ENCODING = config_text(architecture)
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = architecture.stem
    cfg.KD.TEACHER.ELASTIC.SUBNET = proposal.teacher
    cfg.KD.TEACHER.ELASTIC.STORE = store
    return cfg


def inherit(
    cfg: CfgNode,
    proposal: Proposal,
    candidate: Candidate,
    parent: Optional[Candidate],
    store: str,
) -> None:
    """Write ``init.pth`` and ``config.yaml`` of a candidate: S_new = f_evolve(S_old, a).

    The student is its parent's trained one, with the action of the proposal if it has one. The base
    pair has the student of the search's own config and MODEL.WEIGHTS.

    Args:
        cfg: of the search.
        parent: None for the base pair.
        store: folder of recalibrated teachers.

    Raises:
        ValueError, FileNotFoundError: the weights are not there or belong to another student.
    """
    seed_all_rng(candidate_seed(cfg, proposal.number))
    weights = parent.student if parent else cfg.MODEL.WEIGHTS
    own = cfg
    if parent:
        own = candidate_config(cfg, stored_architecture(weights), proposal, candidate, store)
    model = build_model(own)
    extra = load_weights(model, weights, cfg.KD.ALLOW_UNSAFE_LOAD)
    if proposal.action is not None:
        morphism = StudentMorphism(cfg, config_architecture(cfg))
        images = []
        if morphism.needs_images(bottom_up_of(model).architecture, proposal.action):
            images = calibration_images(
                model, build_train_loader(own), cfg.SEARCH.CALIBRATION_BATCHES
            )
        model = morphism.evolve(model, proposal.action, images)
    kept = {}
    if cfg.SEARCH.INHERIT_ADAPTER and parent and "distillers" in extra:
        kept["distillers"] = extra["distillers"]
    write_student(model, candidate.init, cfg, **kept)
    architecture = bottom_up_of(model).architecture
    _write_config(candidate_config(cfg, architecture, proposal, candidate, store), candidate)


def take_from_pool(cfg: CfgNode, proposal: Proposal, candidate: Candidate) -> None:
    """Write ``student.pth`` and ``config.yaml`` of a subnet, recalibrated and not trained."""
    pool_cfg = pool_config(cfg)
    pool = build_model(pool_cfg)
    load_weights(pool, cfg.KD.TEACHER.WEIGHTS, cfg.KD.ALLOW_UNSAFE_LOAD)
    own, model = extract(pool_cfg, pool, Subnet.parse(proposal.teacher))
    recalibrate(model, CalibrationBatches(pool_cfg))
    own.DATASETS.TEST = cfg.DATASETS.TEST
    own.SEARCH = cfg.SEARCH
    own.MODEL.WEIGHTS = candidate.student
    own.OUTPUT_DIR = candidate.folder
    _write_config(own, candidate)
    write_student(model, candidate.student, own, training={"iterations": 0, "epochs": 0.0})


def stored_architecture(path: str) -> Architecture:
    """The entry ``arch`` of a student's checkpoint.

    Raises:
        FileNotFoundError: the file is not there.
    """
    return Architecture.from_entry(load_checkpoint_file(path)["arch"])


def write_student(model: nn.Module, path: str, cfg: CfgNode, **entries: Any) -> None:
    """Write a checkpoint with weights, architecture, class names and further entries."""
    data: Dict[str, Any] = {
        "model": {name: value.cpu() for name, value in model.state_dict().items()},
        **architecture_entry(model),
        **entries,
    }
    if cfg.DATASETS.TRAIN:
        classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", None)
        if classes:
            data["run_info"] = {"classes": list(classes)}
    atomic_save(data, path)


def _write_config(cfg: CfgNode, candidate: Candidate) -> None:
    with atomic_write(candidate.config) as file:
        file.write(cfg.dump().encode())
