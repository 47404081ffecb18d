"""Networks trained one after the other, each of them once: for the demo and for comparisons."""

import argparse
import contextlib
import functools
import glob
import hashlib
import importlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
from typing import Any, Dict, Iterator, Optional

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase, default_setup
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

import kd_d2
from kd_d2.checkpoint import atomic_write
from kd_d2.config import get_cfg
from kd_d2.data import check_datasets, register_all

from .trainer import KDTrainer

__all__ = ["ProgressBar", "finished_result", "prepare_data", "settings", "train_once"]

# written when a run starts and when it has ended
_STARTED, _FINISHED = "run.json", "result.json"
# where files lie says nothing about a run; weights are told by their content
_PLACES = ("OUTPUT_DIR", "KD.TEACHER.CONFIG_FILE", "KD.TEACHER.WEIGHTS")
_PACKAGES = ("torch", "torchvision", "detectron2", "numpy")


class ProgressBar(HookBase):
    """Iterations, time left and total loss on one terminal line."""

    def __init__(self, title: str):
        self._title = title

    def before_train(self):
        self._bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            desc=f"{self._title:<30}",
            file=sys.__stderr__,
            mininterval=0.5,
        )

    def after_step(self):
        latest = self.trainer.storage.latest()
        if "total_loss" in latest:
            self._bar.set_postfix(loss=f"{latest['total_loss'][0]:.3f}", refresh=False)
        self._bar.update()

    def after_train(self):
        self._bar.close()


def settings(cfg: CfgNode) -> Dict[str, str]:
    """Everything that determines a run: dotted key -> value as text.

    Folders are left out. In place of a file of weights stands its SHA-256, "teacher" for that of
    the teacher.
    """
    result = {key: value for key, value in _flat(cfg) if key not in _PLACES}
    weights = {"MODEL.WEIGHTS": cfg.MODEL.WEIGHTS}
    if cfg.KD.ENABLED:
        weights["teacher"] = cfg.KD.TEACHER.WEIGHTS
    for name, path in weights.items():
        if os.path.isfile(path):
            with open(path, "rb") as f:
                result[name] = hashlib.sha256(f.read()).hexdigest()
    return result


def _flat(node: CfgNode, prefix: str = "") -> Iterator:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, repr(value)


def _same(stored: Dict[str, str], current: Dict[str, str]) -> bool:
    """Whether two runs are one; a key that the older one did not know has to have its default."""
    defaults = dict(_flat(get_cfg()))
    return all(current.get(key) == value for key, value in stored.items()) and all(
        value == defaults.get(key) for key, value in current.items() if key not in stored
    )


def _read(cfg: CfgNode, name: str) -> Optional[Dict[str, Any]]:
    """What a run with these very settings has written; None if there was none."""
    path = os.path.join(cfg.OUTPUT_DIR, name)
    if not os.path.isfile(path):
        return None
    with open(path) as f:
        stored = json.load(f)
    return stored if _same(stored["settings"], settings(cfg)) else None


def _write(cfg: CfgNode, name: str, content: Dict[str, Any]) -> None:
    with atomic_write(os.path.join(cfg.OUTPUT_DIR, name)) as f:
        f.write(json.dumps(content, indent=1).encode())


def prepare_data(cfg: CfgNode) -> None:
    """Register and check the data sets, and generate what is generated, with a progress bar.

    Raises:
        FileNotFoundError: a data set is not there; says where it was looked for.
    """
    register_all(cfg)
    check_datasets(cfg)
    for name in cfg.DATASETS.TRAIN:
        DatasetCatalog.get(name)


def finished_result(cfg: CfgNode) -> Optional[Dict[str, Any]]:
    """The result of :func:`train_once` if a run with these settings has ended, else None."""
    return _read(cfg, _FINISHED)


def train_once(cfg: CfgNode, title: str) -> Dict[str, Any]:
    """Train and evaluate a network, or go on with it, or read what came out earlier.

    A run is taken for the same one if all its :func:`settings` are equal. Detectron2's messages
    go to files in ``cfg.OUTPUT_DIR``; the terminal shows a progress bar and warnings.

    Args:
        cfg: config of the run; :func:`prepare_data` was called for it.
        title: beside the progress bar.

    Returns:
        ``metrics`` (COCO's box metrics in percent), ``parameters``, ``iterations``, ``seconds`` of
        training and evaluation, ``resumed`` (then the seconds count from there), ``versions``,
        ``settings``.
    """
    stored = finished_result(cfg)
    if stored is not None:
        return stored
    with _quiet(cfg.OUTPUT_DIR):
        interrupted = _read(cfg, _STARTED) is not None
        if not interrupted:
            _remove_checkpoints(cfg.OUTPUT_DIR)
            _write(cfg, _STARTED, {"settings": settings(cfg)})
        _start_logs(cfg)
        trainer = KDTrainer(cfg)
        trainer.register_hooks([ProgressBar(title)])
        trainer.resume_or_load(resume=interrupted)
        started = time.time()
        metrics = trainer.train() or trainer._last_eval_results
        result = {
            "metrics": dict(metrics["bbox"]),
            "parameters": sum(p.numel() for p in trainer.student.parameters()),
            "iterations": trainer.max_iter,
            "seconds": time.time() - started,
            "resumed": trainer.start_iter > 0,
            "versions": _versions(),
            "settings": settings(cfg),
        }
    _write(cfg, _FINISHED, result)
    return result


def _versions() -> Dict[str, str]:
    packages = {name: importlib.import_module(name).__version__ for name in _PACKAGES}
    return {"python": platform.python_version(), **packages, "kd_d2": _commit()}


def _commit() -> str:
    """Commit of this source tree; "+" behind it: with changes. Else the package's version."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        commit = run([*git, "rev-parse", "--short=10", "HEAD"]).stdout.strip()
        changes = run([*git, "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return kd_d2.__version__
    return commit + ("+" if changes else "")


def _remove_checkpoints(folder: str) -> None:
    """Remove what a run with other settings left, so that it is never continued."""
    names = glob.glob(os.path.join(folder, "model_*.pth"))
    for path in [*names, *(os.path.join(folder, n) for n in ("last_checkpoint", "metrics.json"))]:
        if os.path.isfile(path):
            os.remove(path)


@contextlib.contextmanager
def _quiet(folder: str) -> Iterator[None]:
    """Send what the COCO tools print to a file; the terminal is for progress."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "stdout.txt"), "a") as f, contextlib.redirect_stdout(f):
        yield


def _start_logs(cfg: CfgNode) -> None:
    """Log to the folder of this run only; the terminal shows warnings."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "kd_d2")]
    for logger in loggers:
        logger.handlers.clear()
    default_setup(cfg, argparse.Namespace(config_file="", eval_only=False))
    setup_logger(cfg.OUTPUT_DIR, name="kd_d2", abbrev_name="kd")
    for logger in loggers:
        consoles = [h for h in logger.handlers if type(h) is logging.StreamHandler]
        for handler in consoles:
            logger.removeHandler(handler)
        warnings = logging.StreamHandler(sys.__stderr__)
        warnings.setLevel(logging.WARNING)
        logger.addHandler(warnings)
