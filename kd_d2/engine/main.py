"""What ``train_net.py`` does: read the config, check it, train or evaluate."""

import argparse
import ast
import contextlib
import hashlib
import importlib
import importlib.util
import logging
import os
import pkgutil
import sys
from typing import Callable, Iterable, Iterator, List

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import kd_d2.projects
from kd_d2.checkpoint import (
    KDCheckpointer,
    load_yaml_config,
    merge_opts,
    read_config_file,
    unsafe_load_requested,
)
from kd_d2.config import CONFIG_RESOLVERS, get_cfg
from kd_d2.data import check_datasets, register_all

from .trainer import KDTrainer

__all__ = [
    "build_config",
    "check",
    "import_components",
    "main",
    "prepare",
    "run",
    "setup",
    "short_errors",
    "user_error",
]

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
        FileNotFoundError: the file, or one that it is based on, does not exist.
    """
    opts = list(opts)
    import_components()
    allow_unsafe = unsafe_load_requested(opts)
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
        _absolute(name, base_dir) if name.endswith(".py") else name for name in cfg.KD.IMPORTS
    )
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    for _, resolve in CONFIG_RESOLVERS:
        resolve(cfg)
    cfg.freeze()
    return cfg


def _absolute(path: str, base_dir: str) -> str:
    """Relative to the config file; a path given on the command line may be relative to here."""
    beside_config = os.path.join(base_dir, path)
    if not os.path.exists(beside_config) and os.path.exists(path):
        return os.path.abspath(path)
    return os.path.abspath(beside_config)


def _imports(raw: dict, opts: List[str]) -> List[str]:
    """``KD.IMPORTS``, needed before there is a config that it could be merged into."""
    given = [value for key, value in zip(opts[0::2], opts[1::2]) if key == "KD.IMPORTS"]
    value = given[-1] if given else (raw.get("KD") or {}).get("IMPORTS") or ()
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # a name without quotes; YAML knows no tuples, so ("a", "b") is a string there
    return [value] if isinstance(value, str) else list(value)


def _import_user_module(name: str, base_dir: str) -> None:
    if not name.endswith(".py"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"KD.IMPORTS names module '{name}': {error}") from error
        return
    path = os.path.realpath(_absolute(name, base_dir))
    if not os.path.isfile(path):
        raise ValueError(f"KD.IMPORTS names '{name}', but there is no file {path}")
    # files of the same name in two folders are two modules
    digest = hashlib.sha256(path.encode()).hexdigest()[:8]
    module_name = f"kd_d2_user_{os.path.splitext(os.path.basename(path))[0]}_{digest}"
    if module_name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise


def check(args: argparse.Namespace) -> CfgNode:
    """Build the config and look for its data sets, without setting anything up.

    Raises:
        ValueError, FileNotFoundError: what is wrong, in one sentence; see :func:`build_config`
            and :func:`kd_d2.data.check_datasets`.
    """
    cfg = build_config(args.config_file, args.opts)
    register_all(cfg)
    check_datasets(cfg, train=not args.eval_only)
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """:func:`check`, then set up this process: output folder, loggers, seeds."""
    cfg = check(args)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_d2", abbrev_name="kd")
    if cfg.MODEL.DEVICE == "cpu":
        logger.info("no CUDA device is used: training and evaluation run on the CPU")
    return cfg


def prepare(args: argparse.Namespace) -> Callable:
    """Build and load everything; what the user got wrong is found here, before the first step.

    Returns:
        a function without arguments that trains or evaluates and returns the last results.

    Raises:
        ValueError, FileNotFoundError: config, data, weights or teacher do not fit together.
    """
    cfg = setup(args)
    if args.eval_only:
        model = KDTrainer.build_student(cfg)
        checkpointer = KDCheckpointer(model, cfg.OUTPUT_DIR, allow_unsafe=cfg.KD.ALLOW_UNSAFE_LOAD)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return lambda: _evaluate(cfg, model)
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return lambda: _train(trainer)


def _evaluate(cfg: CfgNode, model: torch.nn.Module):
    results = KDTrainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(KDTrainer.test_with_tta(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _train(trainer: KDTrainer):
    trainer.train()
    return getattr(trainer, "_last_eval_results", None)


def main(args: argparse.Namespace):
    """Train or evaluate in this process.

    Args:
        args: result of Detectron2's ``default_argument_parser``.

    Returns:
        the results of the (last) evaluation; None if there was none.
    """
    return prepare(args)()


def run(args: argparse.Namespace):
    """:func:`main` for the command line, with :func:`short_errors` until training begins."""
    with short_errors():
        job = prepare(args)
    return job()


@contextlib.contextmanager
def short_errors() -> Iterator[None]:
    """End the process with one message, and no traceback, when the user's input is wrong.

    The environment variable KD_D2_TRACEBACK=1 shows where such an error was found.
    """
    try:
        yield
    except Exception as error:
        message = user_error(error)
        if not message or os.environ.get("KD_D2_TRACEBACK") == "1":
            raise
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: {message}")


def user_error(error: Exception) -> str:
    """The message of an exception that wrong input caused; empty for one that is our mistake."""
    if isinstance(error, (ValueError, FileNotFoundError)):
        return str(error)
    # an unknown name in one of Detectron2's registries is a KeyError; others are our mistakes
    if isinstance(error, KeyError) and "registry" in str(error):
        return str(error.args[0])
    return ""
