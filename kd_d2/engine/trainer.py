"""KDTrainer: Detectron2's DefaultTrainer for a student with distillers."""

import logging
import os
import sys
import weakref
from typing import Any, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
    hooks,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kd_d2.checkpoint import KDCheckpointer
from kd_d2.data import build_test_loader, build_train_loader
from kd_d2.distillation import (
    KDModel,
    Teacher,
    build_distillers,
    build_tap,
    build_teacher,
    teacher_wanted,
)
from kd_d2.evaluation import build_evaluator

from .hooks import TeacherEvaluation
from .init_student import (
    FrozenStatistics,
    check_inheritance,
    check_unchanged,
    copy_from_teacher,
    freeze_prefixes,
)
from .optimizer import build_optimizer
from .random_state import preserve_random_state, seed_random_state
from .resume import LoaderRestart, RankStateSnapshot, RestartedPreciseBN
from .scaling import auto_scale_workers
from .train_loop import CheckedAMPTrainer, CheckedSimpleTrainer

__all__ = ["KDTrainer", "RunInfo"]

logger = logging.getLogger(__name__)


class RunInfo:
    """Facts about a run that its checkpoints carry, e.g. for use as a teacher later."""

    def __init__(self, **facts):
        self.facts: Dict[str, Any] = facts

    def state_dict(self):
        return dict(self.facts)

    def load_state_dict(self, state):
        """Facts belong to the run that writes them; nothing is taken over."""


class KDTrainer(DefaultTrainer):
    """Trains what a config describes; with ``KD.ENABLED False`` exactly as Detectron2 does.

    It derives from ``DefaultTrainer`` with a constructor of its own, in the same order, because
    that one fixes the arguments of DDP and the model that is saved. Here the checkpoint's
    ``model`` is the bare student, and distillers, trainer state and facts stand beside it.

    Attributes:
        student: the bare student.
        teacher: the teacher or None.
        rank_states: state of all ranks at the last checkpoint; see :mod:`kd_d2.engine.resume`.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        d2_logger = logging.getLogger("detectron2")
        if not d2_logger.isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)

        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        ddp_arguments = {"device_ids": None} if on_cpu else {}
        model = create_ddp_model(
            model,
            broadcast_buffers=False,
            find_unused_parameters=cfg.KD.DDP_FIND_UNUSED,
            **ddp_arguments,
        )
        self._trainer = self.build_step(cfg, model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.classes = check_classes(cfg, self.student, self.teacher)
        self.rank_state: Optional[Dict[str, Any]] = None
        self.rank_states: Dict[str, Any] = {}
        checkpointables = {"trainer": weakref.proxy(self), "run_info": RunInfo(**self._facts())}
        if self.kd_model is not None:
            checkpointables["distillers"] = self.kd_model.distillers
        self.checkpointer = KDCheckpointer(
            self.student,
            cfg.OUTPUT_DIR,
            allow_unsafe=cfg.KD.ALLOW_UNSAFE_LOAD,
            **checkpointables,
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    # ------------------------------------------------------------------------------- parts
    @property
    def kd_model(self) -> Optional[KDModel]:
        """The KDModel inside a possible DDP wrapper; None when KD is off."""
        model = _unwrap(self.model)
        return model if isinstance(model, KDModel) else None

    @property
    def student(self) -> nn.Module:
        return bare_student(self.model)

    @property
    def teacher(self) -> Optional[Teacher]:
        return None if self.kd_model is None else self.kd_model.teacher

    def _facts(self) -> Dict[str, Any]:
        facts: Dict[str, Any] = {"world_size": comm.get_world_size()}
        if self.classes:
            facts["classes"] = list(self.classes)
        return facts

    # ---------------------------------------------------------------------------- builders
    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        return auto_scale_workers(cfg, num_workers)

    @classmethod
    def build_student(cls, cfg: CfgNode) -> nn.Module:
        """Return the plain detector; needs no teacher and touches no teacher file."""
        return super().build_model(cfg)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Return the student, inside a KDModel if ``KD.ENABLED``.

        Teacher and distillers draw their random numbers aside, the same ones on every rank: the
        student's initial weights and its batches are those of plain training with the same seed,
        and what is random in a teacher or a distiller's buffers is equal on all ranks.
        """
        student = cls.build_student(cfg)
        freeze_prefixes(cfg, student)
        if not cfg.KD.ENABLED:
            return student
        with preserve_random_state():
            seed_random_state(comm.shared_random_seed())
            needed = teacher_wanted(cfg) or bool(cfg.KD.INIT_STUDENT.PREFIXES)
            teacher = build_teacher(cfg) if needed else None
            if teacher is not None:
                logger.info(f"Teacher: {teacher.describe()}")
            student_keys = build_tap(student).keys(student)
            teacher_keys = teacher.keys if teacher is not None else {}
            prefixes = cfg.KD.INIT_STUDENT.PREFIXES
            if prefixes:
                states = student.state_dict(), teacher.state_to_copy()
                networks = student, getattr(teacher, "model", nn.Module())
                check_inheritance(prefixes, *states, student_keys, teacher_keys, networks)
            distillers, schedules = build_distillers(cfg, student_keys, teacher_keys)
            model = KDModel(
                student=student,
                distillers=distillers,
                teacher=teacher,
                schedules=schedules,
                grad_ratio_period=cfg.KD.GRAD_RATIO_PERIOD,
                zero_warning_iters=cfg.KD.ZERO_WARNING_ITERS,
            )
        logger.info(
            "Distillers: "
            + "; ".join(f"{label} {dict(d.weights)}" for label, d in model.distillers.items())
        )
        return model.to(torch.device(cfg.MODEL.DEVICE))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder=None):
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def build_step(cls, cfg: CfgNode, model, data_loader, optimizer):
        """Return the inner trainer that runs single steps.

        Raises:
            ValueError: mixed precision without a GPU, or an unknown SOLVER.AMP.PRECISION.
        """
        simple, mixed = (
            (CheckedSimpleTrainer, CheckedAMPTrainer)
            if cfg.KD.CHECK_FINITE
            else (SimpleTrainer, AMPTrainer)
        )
        if not cfg.SOLVER.AMP.ENABLED:
            return simple(model, data_loader, optimizer)
        precisions = {"float16": torch.float16, "bfloat16": torch.bfloat16}
        if cfg.SOLVER.AMP.PRECISION not in precisions:
            raise ValueError(
                f"SOLVER.AMP.PRECISION must be one of {sorted(precisions)}, "
                f"got '{cfg.SOLVER.AMP.PRECISION}'"
            )
        if not cfg.MODEL.DEVICE.startswith("cuda"):
            raise ValueError(
                "SOLVER.AMP.ENABLED needs a CUDA device, but MODEL.DEVICE is "
                f"'{cfg.MODEL.DEVICE}'; set it to False"
            )
        return mixed(model, data_loader, optimizer, precision=precisions[cfg.SOLVER.AMP.PRECISION])

    # ------------------------------------------------------------------------------- hooks
    def build_hooks(self) -> List[Optional[hooks.HookBase]]:
        """Same hooks as Detectron2 in the same order, on the bare student, plus our own."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # PreciseBN: save memory and time
        precise_bn = cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(self.student)
        period = cfg.SOLVER.CHECKPOINT_PERIOD
        inherited = cfg.KD.INIT_STUDENT
        result = [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            (
                FrozenStatistics(self.student, inherited.PREFIXES)
                if cfg.KD.ENABLED and inherited.FREEZE
                else None
            ),
            self._teacher_evaluation(),
            (
                RestartedPreciseBN(
                    cfg.TEST.EVAL_PERIOD,
                    self.student,
                    self.build_train_loader(cfg),
                    cfg.TEST.PRECISE_BN.NUM_ITER,
                )
                if precise_bn
                else None
            ),
            # gathers from all ranks what the checkpoint written next must hold
            RankStateSnapshot(period),
        ]
        if comm.is_main_process():
            result.append(hooks.PeriodicCheckpointer(self.checkpointer, period))

        def test_and_save_results():
            self._last_eval_results = self.test(self.cfg, self.student)
            return self._last_eval_results

        # after the checkpointer: if it fails, the saved checkpoint can be used to debug
        result.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, test_and_save_results))
        if cfg.TEST.AUG.ENABLED:
            result.append(hooks.EvalHook(0, lambda: self.test_with_tta(self.cfg, self.student)))
        if comm.is_main_process():
            # after evaluation, so that its results are written
            result.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        # last: whatever the hooks above drew from the random generators is undone
        result.append(LoaderRestart(period))
        return result

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> Dict[str, Any]:
        """Evaluate with test-time augmentation, TEST.AUG; results get the suffix "_TTA".

        Raises:
            ValueError: Detectron2 has such augmentation for ``GeneralizedRCNN`` only.
        """
        if cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN":
            raise ValueError(
                "TEST.AUG.ENABLED is for MODEL.META_ARCHITECTURE 'GeneralizedRCNN', got "
                f"'{cfg.MODEL.META_ARCHITECTURE}'"
            )
        evaluators = [
            cls.build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference_TTA"))
            for name in cfg.DATASETS.TEST
        ]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{key}_TTA": value for key, value in results.items()}

    def _teacher_evaluation(self) -> Optional[TeacherEvaluation]:
        mode = self.cfg.KD.EVAL_TEACHER
        sizes = {"never": None, "sample": self.cfg.KD.EVAL_TEACHER_IMAGES, "full": sys.maxsize}
        if mode not in sizes:
            raise ValueError(f"KD.EVAL_TEACHER must be one of {list(sizes)}, got '{mode}'")
        # a teacher without a detector's config cannot be evaluated on detection data
        if sizes[mode] is None or getattr(self.teacher, "cfg", None) is None:
            return None
        return TeacherEvaluation(self.cfg, self.teacher, sizes[mode])

    def restart_data_loader(self) -> None:
        """Drop the running iterator; the next step begins where the loader was rewound to."""
        loader = self.data_loader
        self._trainer.reset_data_loader(lambda: loader)

    # ------------------------------------------------------------------------------- state
    def resume_or_load(self, resume: bool = True):
        """Resume, or load MODEL.WEIGHTS and then copy ``KD.INIT_STUDENT.PREFIXES``.

        Raises:
            ValueError: what ``KD.INIT_STUDENT.FREEZE`` froze in the resumed student is not the
                teacher's.
        """
        super().resume_or_load(resume=resume)
        inherited = self.cfg.KD.INIT_STUDENT
        if not inherited.PREFIXES or self.teacher is None:
            return
        if self.start_iter == 0:
            copy_from_teacher(self.student, self.teacher.state_to_copy(), inherited.PREFIXES)
        elif inherited.FREEZE:
            check_unchanged(self.student, self.teacher.state_to_copy(), inherited.PREFIXES)

    def state_dict(self):
        state = super().state_dict()
        state["loader"] = self.data_loader.state_dict()
        if self.rank_states.get("iteration") == self.iter:
            state["rank_states"] = self.rank_states
        return state

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if "loader" in state:
            self.data_loader.load_state_dict(state["loader"])
        self.rank_states = state.get("rank_states", {})


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def bare_student(model: nn.Module) -> nn.Module:
    """Return the detector inside DDP and KDModel wrappers."""
    model = _unwrap(model)
    return model.student if isinstance(model, KDModel) else model


def check_classes(
    cfg: CfgNode, student: nn.Module, teacher: Optional[Teacher]
) -> Optional[List[str]]:
    """Return the class names of the training data, or raise if they fit neither model.

    Raises:
        ValueError: the student's number of classes differs from the data's, or the teacher's
            class names or their order differ (unless KD.TEACHER.ALLOW_CLASS_MISMATCH).
    """
    if not cfg.DATASETS.TRAIN:
        return None
    name = cfg.DATASETS.TRAIN[0]
    classes = MetadataCatalog.get(name).get("thing_classes", None)
    if not classes:
        return None
    heads = (student, getattr(student, "roi_heads", None))
    predicted = next((m.num_classes for m in heads if hasattr(m, "num_classes")), None)
    if predicted is not None and predicted != len(classes):
        raise ValueError(
            f"data set '{name}' has {len(classes)} classes but the student predicts {predicted}; "
            "set NUM_CLASSES of its head (e.g. MODEL.GFL.NUM_CLASSES, MODEL.RETINANET.NUM_CLASSES "
            f"or MODEL.ROI_HEADS.NUM_CLASSES) to {len(classes)}"
        )
    theirs = None if teacher is None else teacher.classes
    if theirs is not None and list(theirs) != list(classes):
        differing = [
            f"{i}: student '{a}', teacher '{b}'"
            for i, (a, b) in enumerate(zip(classes, theirs))
            if a != b
        ]
        message = (
            f"class lists differ: data set '{name}' has {len(classes)} classes, the teacher "
            f"{len(theirs)}; first differences: {'; '.join(differing[:5]) or 'the count only'}"
        )
        if not cfg.KD.TEACHER.ALLOW_CLASS_MISMATCH:
            raise ValueError(
                message + ". Distillation would teach the wrong classes; set "
                "KD.TEACHER.ALLOW_CLASS_MISMATCH True if this is intended"
            )
        logger.warning(message)
    return list(classes)
