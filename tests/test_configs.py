"""Every shipped config: it loads, says only what differs, and its networks can be built."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data import MetadataCatalog
from detectron2.engine import hooks
from detectron2.modeling import build_model

from kd_d2.checkpoint import load_yaml_config
from kd_d2.distillation import (
    TEACHER_REGISTRY,
    DetectorTeacher,
    build_distillers,
    build_tap,
    teacher_wanted,
)
from kd_d2.engine.main import build_config
from kd_d2.engine.trainer import KDTrainer
from tests.fixtures import registered_toy_dataset, untrained_teacher_keys

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/**/*.yaml")])
# whether Detectron2 has compiled operators, among them deformable convolutions
COMPILED = importlib.util.find_spec("detectron2._C") is not None
# Table 6 and 7 of CrossKD, and the R-18 row of all others
GFL_ROWS = ["gfl_r18_r50_1x", "gfl_r50_r101_1x", "gfl_r34_r101_1x", "gfl_r18_r101_1x"]

every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def _flatten(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _get(cfg, dotted):
    """Value of a key; None if there is none such, as below a node that takes any."""
    return functools.reduce(lambda node, key: (node or {}).get(key), dotted.split("."), cfg)


@functools.lru_cache(maxsize=None)
def _config(*path):
    """What a program makes of a file; without one, the defaults. Frozen, shared by all tests."""
    return build_config(*path)


@functools.lru_cache(maxsize=None)
def _loaded(path):
    """The defaults with a file merged into them, and nothing else."""
    cfg = _config().clone()
    cfg.defrost()
    load_yaml_config(cfg, str(path))
    return cfg


_KEYS = {}


def _keys(cfg):
    """What the tap knows about the networks of a MODEL node; equal nodes are built once."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) and not COMPILED:
        with pytest.raises(ImportError, match="'DeformConv' is not available"):
            build_model(cfg)
        cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4  # all else can be built
    node = str(cfg.MODEL)
    if node not in _KEYS:
        model = build_model(cfg)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
        _KEYS[node] = build_tap(model).keys(model)
    return _KEYS[node]


def _teacher_keys(cfg):
    """What the teacher gives, whatever its type."""
    if not issubclass(TEACHER_REGISTRY.get(cfg.KD.TEACHER.TYPE), DetectorTeacher):
        return untrained_teacher_keys(cfg)
    teacher_cfg = DetectorTeacher.load_config(cfg)
    assert teacher_cfg.DATASETS.TRAIN == cfg.DATASETS.TRAIN  # hence the same classes
    return _keys(teacher_cfg)


def test_there_are_configs():
    names = {p.name for p in FILES}
    assert {"Base-GFL.yaml", "gfl_r50_1x.yaml", "gfl_r101_ms2x.yaml"} <= names
    assert {f"{row}.yaml" for row in GFL_ROWS} <= names


@pytest.fixture
def no_random_weights(monkeypatch):
    """Whatever is in memory instead: drawing numbers takes longer than all the rest."""
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *args, **kwargs: tensor)


@every_file
def test_networks_and_distillers_can_be_built(path, no_random_weights):
    cfg = _config(str(path))
    keys = _keys(cfg)
    if cfg.KD.ENABLED:
        wanted = teacher_wanted(cfg) or bool(cfg.KD.INIT_STUDENT.PREFIXES)
        distillers, schedules = build_distillers(cfg, keys, _teacher_keys(cfg) if wanted else {})
        assert len(distillers) == len(cfg.KD.DISTILLERS) and set(schedules) == set(distillers)
        # head transfer alone has no term
        copied = bool(cfg.KD.INIT_STUDENT.PREFIXES)
        assert all(sum(d.weights.values()) > 0 or copied for d in distillers.values())
        assert bool(cfg.KD.TEACHER.WEIGHTS) or not wanted
        assert not cfg.KD.TEACHER.ALLOW_UNTRAINED


@every_file
def test_files_say_only_what_differs(path):
    """At most three files deep, no machine's paths, nothing that the file below says already."""
    raw = yaml.safe_load(path.read_text())
    base, depth, current = raw.pop("_BASE_", None), 1, path
    next_base = base
    while next_base:
        current = current.parent / next_base
        next_base = yaml.safe_load(current.read_text()).get("_BASE_")
        depth += 1
    assert depth <= 3
    for key, value in _flatten(raw):
        assert not re.match(r"['\"]?(/|~|[A-Za-z]:\\)", str(value)), (key, value)
    if base:
        below, own = _loaded((path.parent / base).resolve()), _loaded(path)
        for key, _ in _flatten(raw):
            assert _get(own, key) != _get(below, key), f"{key} is what {base} says"


def test_output_folders_differ():
    """No recipe overwrites the checkpoints of another one."""
    folders = {}
    for path in FILES:
        folder = _config(str(path)).OUTPUT_DIR
        if folder != "./output":
            folders.setdefault(folder, []).append(path.name)
        else:
            assert path.name.startswith(("Base-", "Schedule-")), f"{path} has no OUTPUT_DIR"
    assert all(len(names) == 1 for names in folders.values()), folders


def test_readmes_list_the_recipes_on_coco():
    for readme in ROOT.glob("projects/*/README.md"):
        text = readme.read_text()
        for path in readme.parent.glob("configs/COCO/**/*.yaml"):
            assert f"]({path.relative_to(readme.parent)})" in text, path


@pytest.mark.slow
@pytest.mark.parametrize("row", GFL_ROWS)
def test_gfl_rows_train_on_the_classes_of_coco(row, tmp_path):
    """Two iterations of the real trainer with the real networks, on small images."""
    classes = MetadataCatalog.get("coco_2017_train").thing_classes
    assert len(classes) == 80
    with registered_toy_dataset(tmp_path, 4, classes, size=(128, 128)) as name:
        cfg = build_config(
            str(ROOT / f"projects/CrossKD/configs/COCO/{row}.yaml"),
            [
                *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path)),
                *("KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_UNTRAINED", "True"),
                *("KD.EVAL_TEACHER", "never", "DATASETS.TRAIN", (name,), "DATASETS.TEST", ()),
                *("INPUT.MIN_SIZE_TRAIN", (128,), "INPUT.MAX_SIZE_TRAIN", "128"),
                *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", ()),
                *("DATALOADER.NUM_WORKERS", "0", "SEED", "1"),
            ],
        )
        trainer = KDTrainer(cfg)
        # hundreds of megabytes that nobody reads
        trainer._hooks = [
            h for h in trainer._hooks if not isinstance(h, hooks.PeriodicCheckpointer)
        ]
        before = {k: v.clone() for k, v in trainer.student.state_dict().items()}
        teacher = {k: v.clone() for k, v in trainer.teacher.model.state_dict().items()}
        trainer.train()

    latest = {k: v for k, (v, _) in trainer.storage.latest().items()}
    for term in ("loss_gfl_cls", "loss_kd/crosskd/cls", "loss_kd/crosskd/reg"):
        assert torch.isfinite(torch.tensor(latest[term])) and latest[term] >= 0, term
    assert latest["loss_kd/crosskd/cls"] > 0
    student = trainer.student.state_dict()
    assert any(not torch.equal(student[k], v) for k, v in before.items() if "cls_subnet" in k)
    for key, value in trainer.teacher.model.state_dict().items():
        assert torch.equal(value, teacher[key]), key
