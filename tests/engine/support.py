"""Runs of the trainer on toy data, in this process, for the tests of the engine."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import get_cfg as get_d2_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from kd_d2.config import CONFIG_NODES
from kd_d2.distillation import DISTILLER_REGISTRY
from kd_d2.engine import KDTrainer
from kd_d2.engine.main import build_config, import_components
from tests.fixtures import CLASSES, save_weights, tiny_cfg, tiny_model

ROOT = Path(__file__).parents[2]
USER_MODULE = Path(__file__).with_name("user_distiller.py")

# For short runs with distillation whose student has an adapter, a queue and random numbers.
THREE_DISTILLERS = {
    "KD.ENABLED": True,
    "KD.DISTILLERS": ("CrossKD", "PKD", "Queue"),
    "KD.CROSSKD.POSITION": 1,
    "KD.PKD.SCHEDULE.START_ITER": 1,
    "KD.PKD.SCHEDULE.WARMUP_ITERS": 4,
}


class Curve(HookBase):
    """The losses, learning rate and logged values of every iteration, as they are."""

    def __init__(self):
        self.values = {}

    def after_step(self):
        ours = ("loss", "total", "lr", "kd_")
        self.values[self.trainer.iter] = {
            name: value
            for name, (value, iteration) in self.trainer.storage.latest().items()
            if name.startswith(ours) and iteration == self.trainer.iter
        }


class Stopped(Exception):
    """A run was interrupted on purpose."""


class StopAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise Stopped


def train(cfg, trainer_class=KDTrainer, resume=False, hooks=(), started=None):
    """Seed like ``default_setup``, train, and return the trainer with its ``curve``.

    Args:
        started: called with the trainer before its first step.
    """
    seed_all_rng(cfg.SEED + comm.get_rank())
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=resume)
    curve = Curve()
    trainer.register_hooks([curve, *hooks])
    trainer.curve = curve.values
    if started is not None:
        started(trainer)
    with contextlib.suppress(Stopped):
        trainer.train()
    return trainer


def assert_same_state(first, second):
    """Bitwise equality of two nested states, with the path of the first difference."""
    _assert_same(first, second, "")


def _assert_same(first, second, path):
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert list(map(str, first)) == list(map(str, second)), path
        for key in first:
            _assert_same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for index, (a, b) in enumerate(zip(first, second)):
            _assert_same(a, b, f"{path}[{index}]")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), path
    else:
        assert first == second, path


def write_yaml(path, cfg, **overrides):
    """Write what distinguishes ``cfg`` from Detectron2's own defaults; return the path.

    Args:
        overrides: further keys, which plain Detectron2 need not know: dotted name -> value.
    """
    content = _differences(cfg, get_d2_cfg())
    for key, value in overrides.items():
        *nodes, name = key.split(".")
        node = content
        for part in nodes:
            node = node.setdefault(part, {})
        node[name] = list(value) if isinstance(value, tuple) else value
    Path(path).write_text(yaml.safe_dump(content))
    return str(path)


def _differences(cfg, default):
    result = {}
    for key, value in default.items():
        if isinstance(value, type(default)):
            below = _differences(cfg[key], value)
            if below:
                result[key] = below
        elif cfg[key] != value or key == "VERSION":
            result[key] = list(cfg[key]) if isinstance(cfg[key], tuple) else cfg[key]
    return result


def teacher_keys(folder, meta_arch, seed=11, classes=CLASSES, **overrides):
    """Write a teacher of the given kind; return the keys of the student's config that name it."""
    folder = Path(folder)
    model = tiny_model(meta_arch, seed=seed, **overrides)
    weights = save_weights(model, folder / "teacher.pth", classes=classes)
    config = write_yaml(folder / "teacher.yaml", tiny_cfg(meta_arch, **overrides))
    # keys of our own detectors are no keys of Detectron2
    node = tiny_cfg(meta_arch, **overrides).MODEL.get(meta_arch)
    if meta_arch in ("GFL", "ATSS", "FCOS"):
        keys = ("NUM_CLASSES", "NUM_CONVS", "CONV_DIM")
        extra = {f"MODEL.{meta_arch}.{key}": node[key] for key in keys}
        write_yaml(config, tiny_cfg(meta_arch, **overrides), **extra)
    return {"KD.TEACHER.CONFIG_FILE": config, "KD.TEACHER.WEIGHTS": weights}


def data_module(path, name):
    """Write a Python file that registers a toy data set in another process; return its path."""
    metadata = MetadataCatalog.get(name)
    Path(path).write_text(
        "from detectron2.data import DatasetCatalog\n"
        "from detectron2.data.datasets import register_coco_instances\n\n"
        f"if {name!r} not in DatasetCatalog.list():\n"
        f"    register_coco_instances({name!r}, {{}}, {metadata.json_file!r}, "
        f"{metadata.image_root!r})\n"
    )
    return str(path)


@pytest.fixture
def user_distiller():
    """Register the distiller "Queue" with its node, as KD.IMPORTS does; undone afterwards."""
    with registered_user_module():
        yield


@contextlib.contextmanager
def registered_user_module():
    with isolated_registries():
        build_config(opts=["KD.IMPORTS", repr((str(USER_MODULE),))])
        yield


@contextlib.contextmanager
def isolated_registries():
    """Undo what modules named in KD.IMPORTS register."""
    import_components()
    registries = (DISTILLER_REGISTRY, CONFIG_NODES)
    before = [dict(registry._obj_map) for registry in registries]
    modules = set(sys.modules)
    try:
        yield
    finally:
        for registry, objects in zip(registries, before):
            registry._obj_map.clear()
            registry._obj_map.update(objects)
        for name in set(sys.modules) - modules:
            if name.startswith("kd_d2_user_"):
                del sys.modules[name]


def run_program(command, timeout, **environment):
    """Run a command in a process group of its own, which is killed if it takes too long.

    Args:
        environment: variables added to those of this process.

    Returns:
        exit code, and stdout and stderr together.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"still running after {timeout} s:\n{output[-3000:]}") from None
    return process.returncode, output


@contextlib.contextmanager
def importable_tools(folder):
    """A function that imports a script of ``folder`` by name, as scripts import each other.

    Projects have scripts of equal names, so none stays imported.
    """
    names = [path.stem for path in Path(folder).glob("*.py")]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        try:
            yield importlib.import_module
        finally:
            for name in names:
                sys.modules.pop(name, None)
