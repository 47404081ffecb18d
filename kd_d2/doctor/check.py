"""A config put together as for training, up to one step on noise, without training."""

import contextlib
import logging
import math
import os
import tempfile
import textwrap
import traceback
import warnings
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from kd_d2.analysis import random_batch
from kd_d2.data import check_datasets, register_all
from kd_d2.engine import KDTrainer
from kd_d2.engine.main import build_config, user_error

from .inventory import list_datasets

__all__ = ["Finding", "check_config"]

logger = logging.getLogger(__name__)

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "FAILED", "skipped"
_LOGGERS = ("detectron2", "fvcore", "kd_d2")
# side of the images of the trial step, unless the network demands another one
_SIDE = 256


@dataclass
class Finding:
    """What became of one check.

    Args:
        name: of the check.
        status: "ok", "warning", "FAILED" or "skipped".
        lines: what was found; of a failure the message.
    """

    name: str
    status: str = OK
    lines: List[str] = field(default_factory=list)


class _Trial(KDTrainer):
    """The trainer without anything that writes.

    Attributes:
        has_data: False where the data sets are not there: nothing is loaded of them.
    """

    has_data = True

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return super().build_train_loader(cfg) if cls.has_data else []

    def build_writers(self):
        return []


class _TrialWithoutData(_Trial):
    has_data = False


def check_config(
    config_file: str, opts: Sequence[str] = (), *, data: bool = True, step: bool = True
) -> Iterator[Finding]:
    """Check a config in the order in which the trainer would refuse it.

    What the trainer builds is built: student, teacher with its weights, distillers, optimizer,
    training loader, initial weights. Nothing is written, apart from what data sets generate when
    they are first used. After a failure only those checks go on that do not depend on it.

    Args:
        config_file, opts: see :func:`kd_d2.engine.main.build_config`.
        data: look for the data sets, and read the training annotations.
        step: run one training step on two images of noise, forward and backward.

    Yields:
        one finding for each check, as soon as it is made.
    """
    with _caught("config") as finding:
        cfg = build_config(config_file, opts)
        finding.lines.append(
            f"{cfg.MODEL.META_ARCHITECTURE} with {cfg.MODEL.BACKBONE.NAME} on {cfg.MODEL.DEVICE}, "
            + (f"taught by {', '.join(cfg.KD.DISTILLERS)}" if cfg.KD.ENABLED else "KD is off")
        )
    yield finding
    if finding.status == FAILED:
        return

    with _caught("data sets") as finding:
        register_all(cfg)
        if data:
            check_datasets(cfg)
        else:
            finding.status = SKIPPED
        names = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        finding.lines += [f"{x.name}: {x.path or 'in memory'}" for x in list_datasets(names)]
    yield finding
    trial = _TrialWithoutData if finding.status in (FAILED, SKIPPED) else _Trial

    with tempfile.TemporaryDirectory(prefix="kd_d2_doctor_") as folder:
        cfg = cfg.clone()
        cfg.defrost()
        # an output folder may be in use; the trainer tidies it
        cfg.OUTPUT_DIR = folder
        cfg.freeze()
        with _caught("student, teacher, distillers") as finding:
            trainer = trial(cfg)
            finding.lines += _parts(trainer)
        yield finding
        if finding.status == FAILED:
            return
        with _caught("initial weights") as finding:
            trainer.resume_or_load(resume=False)
            finding.lines += _initial_weights(trainer)
        yield finding
        if finding.status == FAILED:
            return
        with _caught("a training step on noise") as finding:
            if step:
                finding.lines += _step(trainer)
            else:
                finding.status = SKIPPED
        yield finding


@contextlib.contextmanager
def _caught(name: str) -> Iterator[Finding]:
    """A finding that fails with the exception of the block, and gets the warnings logged in it."""
    finding = Finding(name)
    messages: List[str] = []
    with _listening(messages), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Python are for developers
        try:
            yield finding
        except Exception as error:  # whatever it is, training would have ended with it
            finding.status = FAILED
            finding.lines = [user_error(error) or _unexpected(error)]
            if os.environ.get("KD_D2_TRACEBACK") == "1":
                finding.lines.append(traceback.format_exc())
    if messages and finding.status == OK:
        finding.status = WARNING
    finding.lines += [f"warning: {message}" for message in dict.fromkeys(messages)]


def _unexpected(error: Exception) -> str:
    return f"{type(error).__name__}: {error} (KD_D2_TRACEBACK=1 shows where)"


class _Collector(logging.Handler):
    def __init__(self, messages: List[str]):
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


@contextlib.contextmanager
def _listening(messages: List[str]) -> Iterator[None]:
    """Collect warnings of the libraries; the rest of what they log is not shown."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(x.handlers[:], x.level, x.propagate) for x in loggers]
    collector = _Collector(messages)
    for logger in loggers:
        # INFO is enabled, or the trainer would set up Detectron2's own handlers
        logger.handlers, logger.propagate = [collector], False
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


# ---------------------------------------------------------------------------- what was found
def _parts(trainer: KDTrainer) -> List[str]:
    student = trainer.student
    parameters = sum(p.numel() for p in student.parameters())
    lines = [f"student: {type(student).__name__}, {parameters / 1e6:.2f} M parameters"]
    if trainer.kd_model is None:
        lines.append("no teacher and no distillers: KD.ENABLED is False")
    else:
        teacher = trainer.teacher
        text = "none is needed" if teacher is None else teacher.describe()
        lines.append(f"teacher: {textwrap.shorten(text, 400, placeholder=' ...')}")
        for label, distiller in trainer.kd_model.distillers.items():
            weights = ", ".join(
                f"{term} x {weight:g}" for term, weight in distiller.weights.items()
            )
            schedule = trainer.kd_model.schedules.get(label)
            start = 0 if schedule is None else schedule.start_iter
            lines.append(f"distiller {label}: {weights}{f', from step {start}' if start else ''}")
    if trainer.classes:
        lines.append(f"{len(trainer.classes)} classes: {_shortened(trainer.classes)}")
    return lines


def _shortened(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _initial_weights(trainer: KDTrainer) -> List[str]:
    path, report = trainer.cfg.MODEL.WEIGHTS, trainer.checkpointer.last_report
    if not path or report is None:
        return ["MODEL.WEIGHTS is empty: the student starts from random weights"]
    state = trainer.student.state_dict()
    left = set(report.missing) | {name for name, *_ in report.mismatched}
    lines = [f"MODEL.WEIGHTS {path} fills {len(state) - len(left)} of {len(state)} tensors"]
    if left:
        lines.append(f"not filled, hence random: {_shortened(_groups(left))}")
    return lines


def _groups(keys) -> List[str]:
    """The first two parts of dotted names."""
    return sorted({".".join(key.split(".")[:2]) for key in keys})


def _step(trainer: KDTrainer) -> List[str]:
    """Forward and backward on two images.

    Raises:
        ValueError: a loss or a gradient is not finite.
    """
    model, student = trainer.model.train(), trainer.student
    heads = (student, getattr(student, "roi_heads", None))
    num_classes = next((x.num_classes for x in heads if hasattr(x, "num_classes")), 1)
    side = trainer.cfg.MODEL.SSD.INPUT_SIZE if _is_ssd(trainer.cfg) else _SIDE
    schedules = trainer.kd_model.schedules.values() if trainer.kd_model is not None else ()
    # a step in which all distillers are active and warmed up, if there is one
    start = max((x.start_iter + x.warmup_iters for x in schedules), default=0)
    with EventStorage(start):
        losses = model(random_batch(2, side, side, num_classes))
    values: Dict[str, float] = {name: loss.item() for name, loss in losses.items()}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(
            f"on images of noise of {side}x{side} pixels {', '.join(bad)} is not finite ("
            + ", ".join(f"{name} {value:g}" for name, value in values.items())
            + "); give MODEL.WEIGHTS and trained teachers, and look at the weights of the losses"
        )
    sum(losses.values()).backward()
    infinite = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    if infinite:
        raise ValueError(
            f"on images of noise of {side}x{side} pixels the gradient of {infinite[0]} and "
            f"{len(infinite) - 1} other parameters is not finite"
        )
    lines = ["; ".join(f"{name} {value:.4g}" for name, value in values.items())]
    zero = [name for name, value in values.items() if value == 0 and name.startswith("loss_kd/")]
    if zero:
        logger.warning(f"exactly 0, which may be right for noise: {', '.join(zero)}")
    return lines


def _is_ssd(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE == "SSD"
