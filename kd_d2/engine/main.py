"""What ``train_net.py`` does: read the config, check it, train or evaluate."""

import argparse
import importlib
import importlib.util
import logging
import os
import pkgutil
import sys
from typing import Iterable, List

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import kd_d2.projects
from kd_d2.checkpoint import KDCheckpointer, load_yaml_config, merge_opts, read_config_file
from kd_d2.config import get_cfg
from kd_d2.data import check_datasets, register_all

from .trainer import KDTrainer

__all__ = ["build_config", "import_components", "main", "setup"]

logger = logging.getLogger(__name__)


def import_components() -> None:
    """Import everything that registers classes and config nodes: library and all projects."""
    importlib.import_module("kd_d2.modeling")
    importlib.import_module("kd_d2.distillation")
    importlib.import_module("kd_d2.baselines")
    for module in pkgutil.iter_modules(kd_d2.projects.__path__):
        if module.ispkg:
            importlib.import_module(f"kd_d2.projects.{module.name}")


def build_config(config_file: str = "", opts: Iterable[str] = ()) -> CfgNode:
    """Return the frozen config of a run.

    Args:
        config_file: YAML file; empty for the defaults.
        opts: alternating keys and values that override it.

    Raises:
        ValueError: unreadable file, unknown key, value of a wrong type, missing module.
    """
    opts = list(opts)
    import_components()
    allow_unsafe = _option(opts, "KD.ALLOW_UNSAFE_LOAD", "False") == "True"
    raw = read_config_file(config_file, allow_unsafe=allow_unsafe) if config_file else {}
    base_dir = os.path.dirname(os.path.abspath(config_file)) if config_file else os.getcwd()
    for name in _imports(raw, opts):
        _import_user_module(name, base_dir)
    cfg = get_cfg()
    if config_file:
        load_yaml_config(cfg, config_file, allow_unsafe=allow_unsafe)
    merge_opts(cfg, opts)
    node = cfg.KD.TEACHER
    if node.CONFIG_FILE:
        node.CONFIG_FILE = _absolute(node.CONFIG_FILE, base_dir)
    cfg.KD.IMPORTS = tuple(
        os.path.join(base_dir, name) if name.endswith(".py") else name for name in cfg.KD.IMPORTS
    )
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def _absolute(path: str, base_dir: str) -> str:
    """Relative to the config file; a path given on the command line may be relative to here."""
    beside_config = os.path.join(base_dir, path)
    if not os.path.exists(beside_config) and os.path.exists(path):
        return os.path.abspath(path)
    return os.path.abspath(beside_config)


def _option(opts: List[str], key: str, default):
    return next((v for k, v in zip(opts[0::2], opts[1::2]) if k == key), default)


def _imports(raw: dict, opts: List[str]) -> List[str]:
    value = _option(opts, "KD.IMPORTS", None)
    if value is None:
        return list((raw.get("KD") or {}).get("IMPORTS") or ())
    return [name.strip(" '\"") for name in value.strip("()[] ").split(",") if name.strip(" '\"")]


def _import_user_module(name: str, base_dir: str) -> None:
    if not name.endswith(".py"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"KD.IMPORTS names module '{name}': {error}") from error
        return
    path = name if os.path.isabs(name) else os.path.join(base_dir, name)
    module_name = "kd_d2_user_" + os.path.splitext(os.path.basename(path))[0]
    if module_name in sys.modules:
        return
    if not os.path.isfile(path):
        raise ValueError(f"KD.IMPORTS names '{name}', but there is no file {path}")
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


def setup(args: argparse.Namespace) -> CfgNode:
    """Build the config and set up this process: output folder, loggers, seeds, data sets."""
    cfg = build_config(args.config_file, args.opts)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_d2", abbrev_name="kd")
    if cfg.MODEL.DEVICE == "cpu":
        logger.info("no CUDA device is used: training and evaluation run on the CPU")
    register_all(cfg)
    check_datasets(cfg, train=not args.eval_only)
    return cfg


def main(args: argparse.Namespace):
    """Train or evaluate in this process.

    Returns:
        the results of the (last) evaluation.
    """
    cfg = setup(args)
    if args.eval_only:
        model = KDTrainer.build_student(cfg)
        checkpointer = KDCheckpointer(
            model, cfg.OUTPUT_DIR, allow_unsafe=cfg.KD.ALLOW_UNSAFE_LOAD
        )
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return KDTrainer.test(cfg, model)
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()
