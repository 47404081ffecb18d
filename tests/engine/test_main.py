"""Config of a run, its checks, and what a run leaves behind."""

import json
import logging
import pickle
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from detectron2.engine import default_argument_parser

from kd_d2.config import get_cfg
from kd_d2.engine import KDTrainer
from kd_d2.engine.main import build_config, check, main, prepare, short_errors
from kd_d2.engine.scaling import auto_scale_workers
from tests.engine.support import (
    USER_MODULE,
    data_module,
    isolated_registries,
    teacher_keys,
    train,
    write_yaml,
)
from tests.fixtures import registered_toy_dataset, tiny_cfg, tiny_model


@pytest.fixture(autouse=True)
def nothing_left_registered():
    with isolated_registries():
        yield


@pytest.fixture
def toy(tmp_path):
    with registered_toy_dataset(tmp_path, 4, size=(64, 64)) as name:
        yield name


def arguments(config_file, *options):
    return default_argument_parser().parse_args(["--config-file", str(config_file), *options])


def kd_yaml(folder, toy, **changes):
    """Write a student's config with all three distillers; return its path."""
    teacher_keys(folder, "RetinaNet")
    cfg = tiny_cfg(
        "RetinaNet",
        **{
            "DATASETS.TRAIN": (toy,),
            "INPUT.MIN_SIZE_TRAIN": (64,),
            "OUTPUT_DIR": str(folder / "output"),
        },
    )
    keys = {
        "KD.ENABLED": True,
        "KD.DISTILLERS": ("CrossKD", "PKD", "Queue"),
        "KD.CROSSKD.POSITION": 1,
        "KD.TEACHER.CONFIG_FILE": "teacher.yaml",
        "KD.TEACHER.WEIGHTS": str(folder / "teacher.pth"),
        "KD.IMPORTS": ("data.py", str(USER_MODULE)),
    }
    data_module(folder / "data.py", toy)
    return write_yaml(folder / "student.yaml", cfg, **{**keys, **changes})


# ------------------------------------------------------------------------------ build_config
def test_user_module_beside_the_config(tmp_path, monkeypatch):
    """A dotted module and a file relative to the config; nodes exist when the config is read."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "method.py").write_text(
        "from kd_d2.config import CONFIG_NODES\n\n\n"
        "@CONFIG_NODES.register()\n"
        "def add_method(cfg):\n"
        "    cfg.KD.MY_METHOD = type(cfg)({'WEIGHT': 1.0})\n"
    )
    (tmp_path / "some_package.py").write_text(
        "from kd_d2.config import CONFIG_NODES\n\n\n"
        "@CONFIG_NODES.register()\n"
        "def add_package(cfg):\n"
        "    cfg.KD.MY_PACKAGE = type(cfg)({'WEIGHT': 1.0})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for text in ("['method.py', some_package]", '("method.py", "some_package")'):
        with isolated_registries():
            (folder / "a.yaml").write_text(
                f"KD:\n  IMPORTS: {text}\n  MY_METHOD: {{WEIGHT: 2.5}}\n"
                "  MY_PACKAGE: {WEIGHT: 3.5}\n  TEACHER: {CONFIG_FILE: ../teacher.yaml}\n"
            )
            monkeypatch.chdir(tmp_path)
            cfg = build_config("configs/a.yaml")
            assert (cfg.KD.MY_METHOD.WEIGHT, cfg.KD.MY_PACKAGE.WEIGHT) == (2.5, 3.5)
            assert cfg.KD.IMPORTS == (str(folder / "method.py"), "some_package")
            assert cfg.KD.TEACHER.CONFIG_FILE == str(tmp_path / "teacher.yaml")
            assert cfg.is_frozen()
            # what was written reproduces the run, from anywhere
            (tmp_path / "dump.yaml").write_text(cfg.dump())
            monkeypatch.chdir(folder)
            again = build_config(str(tmp_path / "dump.yaml"))
            assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())
            monkeypatch.delitem(sys.modules, "some_package")
    assert "MY_METHOD" not in get_cfg().KD


def test_user_modules_of_the_same_name_are_two(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "method.py").write_text(
            "from kd_d2.config import CONFIG_NODES\n\n\n"
            "@CONFIG_NODES.register()\n"
            f"def add_method_{number}(cfg):\n    cfg.KD.METHOD_{number} = 0\n"
        )
    paths = tuple(str(tmp_path / str(number) / "method.py") for number in (1, 2))
    cfg = build_config(opts=["KD.IMPORTS", repr(paths), "KD.METHOD_2", "5"])
    assert (cfg.KD.METHOD_1, cfg.KD.METHOD_2) == (0, 5)
    # the last of several values counts
    options = ["KD.IMPORTS", "('nowhere.py',)", "KD.IMPORTS", repr(paths)]
    assert build_config(opts=options).KD.IMPORTS == paths


@pytest.mark.parametrize("name, message", [("lost.py", "there is no file"), ("lost_module", "No")])
def test_missing_user_module(name, message, tmp_path):
    (tmp_path / "a.yaml").write_text(f"KD: {{IMPORTS: [{name}]}}")
    with pytest.raises(ValueError, match=f"KD.IMPORTS names .*{name}.*{message}"):
        build_config(str(tmp_path / "a.yaml"))


def test_device_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert build_config(opts=["MODEL.DEVICE", "cuda"]).MODEL.DEVICE == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert build_config(opts=["MODEL.DEVICE", "cuda"]).MODEL.DEVICE == "cuda"


# ------------------------------------------------------------------------------------ errors
@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({}, ["KD.ENABLD", "True"], "KD.ENABLD.*did you mean KD.ENABLED"),
        ({}, ["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER must be of type int"),
        ({}, ["DATASETS.TRAIN", "('coco_2017_trian',)"], "unknown name 'coco_2017_trian'"),
        ({"KD.EVAL_TEACHER": "often"}, [], "KD.EVAL_TEACHER must be one of.*'often'"),
        ({"MODEL.META_ARCHITECTURE": "RetinaNetz"}, [], "No object named 'RetinaNetz'"),
        ({"MODEL.RETINANET.NUM_CLASSES": 4}, ["KD.ENABLED", "False"], "3 classes.*predicts 4"),
        ({"SOLVER.AMP.ENABLED": True}, ["KD.ENABLED", "False"], "AMP.ENABLED needs a CUDA device"),
        (
            {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": "half"},
            ["KD.ENABLED", "False"],
            r"PRECISION must be one of \['bfloat16', 'float16'\], got 'half'",
        ),
        ({"KD.DISTILLERS": ("CrosKD",)}, [], "KD.DISTILLERS names 'CrosKD'"),
        ({"KD.TEACHER.WEIGHTS": "lost.pth"}, [], "lost.pth does not exist"),
        ({"KD.TEACHER.CONFIG_FILE": "lost.yaml"}, [], "lost.yaml.*does not exist"),
        ({"MODEL.WEIGHTS": "lost.pth"}, ["KD.ENABLED", "False"], "lost.pth does not exist"),
    ],
)
def test_wrong_input_ends_with_one_message(changes, options, message, toy, tmp_path, capfd):
    args = arguments(kd_yaml(tmp_path, toy, **changes), *options)
    with pytest.raises(SystemExit) as end, short_errors():
        prepare(args)
    text = str(end.value.code)
    assert re.search(message, text), text
    assert ": error: " in text and "Traceback" not in capfd.readouterr().err


def test_missing_files_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    path = write_yaml(tmp_path / "a.yaml", tiny_cfg("RetinaNet"))
    options = ["DATASETS.TRAIN", "('bccd_trainval',)", "MODEL.DEVICE", "cpu"]
    with pytest.raises(SystemExit, match="bccd_trainval was looked for in .*nowhere.*to get it"):
        with short_errors():
            check(arguments(path, *options))
    # evaluation asks for the test sets only
    check(arguments(path, "--eval-only", *options))
    with pytest.raises(SystemExit, match="lost.yaml does not exist"), short_errors():
        check(arguments(tmp_path / "lost.yaml"))


def test_mistakes_of_the_program_keep_their_traceback(monkeypatch):
    with pytest.raises(KeyError), short_errors():
        raise KeyError("loss_cls")
    with pytest.raises(RuntimeError), short_errors():
        raise RuntimeError("shapes differ")
    monkeypatch.setenv("KD_D2_TRACEBACK", "1")
    with pytest.raises(ValueError), short_errors():
        raise ValueError("shown where it was found")


# -------------------------------------------------------------------------------------- runs
def test_run_from_a_yaml_and_again_from_its_dump(toy, tmp_path, monkeypatch):
    """The dumped config reproduces the run; metrics.json and TensorBoard are written."""
    monkeypatch.chdir(tmp_path)
    path = kd_yaml(tmp_path, toy, **{"KD.CROSSKD.REG_WEIGHT": 0.5})
    args = arguments(path)
    args.opts = ["SOLVER.MAX_ITER", "4"]
    main(args)
    output = tmp_path / "output"
    first = torch.load(output / "model_final.pth", weights_only=True)
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    expected = {"iteration", "total_loss", "loss_cls", "loss_box_reg", "lr", "data_time"}
    expected |= {"loss_kd/crosskd/cls", "loss_kd/crosskd/reg", "loss_kd/pkd/feat"}
    expected |= {"loss_kd/queue/mean", "loss_kd/queue/queue", "kd_raw/pkd/feat", "kd_factor/pkd"}
    assert lines[-1]["iteration"] == 3 and expected <= set(lines[-1])
    assert any(f.name.startswith("events.out.tfevents") for f in output.iterdir())
    log = (output / "log.txt").read_text()
    progress = re.search(r"eta: .*iter: 3 .*", log).group()
    for name in ("total_loss: ", "loss_cls: ", "loss_kd/crosskd/cls: ", "lr: "):
        assert name in progress
    assert "Teacher: RetinaNet from" in log and "Distillers: crosskd" in log
    assert "on the CPU" in log

    (tmp_path / "again.yaml").write_text((output / "config.yaml").read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    args = arguments(tmp_path / "again.yaml")
    args.opts = ["OUTPUT_DIR", str(tmp_path / "second")]
    main(args)
    second = torch.load(tmp_path / "second" / "model_final.pth", weights_only=True)
    for key, value in first["model"].items():
        torch.testing.assert_close(second["model"][key], value, rtol=1e-4, atol=1e-6)

    # --resume goes on from the last checkpoint, and a finished run has nothing left to do
    args = arguments(path, "--resume")
    args.opts = ["SOLVER.MAX_ITER", "5"]
    main(args)
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 4


def test_imagenet_weights_reach_the_bare_student(toy, tmp_path):
    """A .pkl in the zoo's format, whose names are matched by heuristics, with KD on."""
    source = tiny_model("RetinaNet", seed=21, **{"MODEL.RESNETS.NORM": "BN"})
    names = {
        key: value.numpy()
        for key, value in source.backbone.bottom_up.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    names["stem.fc.weight"] = np.zeros((2, 2), dtype=np.float32)
    content = {"model": names, "__author__": "torchvision", "matching_heuristics": True}
    with open(tmp_path / "R-18.pkl", "wb") as file:
        pickle.dump(content, file)
    changes = {
        **teacher_keys(tmp_path, "RetinaNet"),
        "MODEL.WEIGHTS": str(tmp_path / "R-18.pkl"),
        "MODEL.RESNETS.NORM": "BN",
        "DATASETS.TRAIN": (toy,),
        "OUTPUT_DIR": str(tmp_path / "output"),
        "KD.ENABLED": True,
        "KD.DISTILLERS": ("PKD",),
    }
    trainer = KDTrainer(tiny_cfg("RetinaNet", **changes))
    trainer.resume_or_load(resume=False)
    loaded = trainer.student.backbone.bottom_up.state_dict()
    for key, value in source.backbone.bottom_up.state_dict().items():
        assert torch.equal(loaded[key], value), key


def test_results_of_the_last_evaluation_are_returned(toy, tmp_path):
    path = kd_yaml(tmp_path, toy, **{"KD.ENABLED": False})
    args = arguments(path)
    args.opts = ["SOLVER.MAX_ITER", "1", "DATASETS.TEST", f"('{toy}',)"]
    assert set(main(args)) == {"bbox"}


# ----------------------------------------------------------------------------------- scaling
def test_reference_world_size_scales_schedules_too(toy, tmp_path):
    cfg = tiny_cfg(
        "RetinaNet",
        **{
            "SOLVER.REFERENCE_WORLD_SIZE": 2,
            "SOLVER.IMS_PER_BATCH": 4,
            "SOLVER.BASE_LR": 0.02,
            "SOLVER.MAX_ITER": 1,
            "SOLVER.STEPS": (10,),
            "KD.PKD.SCHEDULE.START_ITER": 10,
            "KD.PKD.SCHEDULE.WARMUP_ITERS": 4,
            "KD.PKD.SCHEDULE.END_ITER": 50,
            "DATASETS.TRAIN": (toy,),
            "OUTPUT_DIR": str(tmp_path / "output"),
        },
    )
    cfg.freeze()
    scaled = auto_scale_workers(cfg, 1)
    assert scaled.SOLVER.IMS_PER_BATCH == 2 and scaled.SOLVER.BASE_LR == 0.01
    assert scaled.SOLVER.MAX_ITER == 2 and scaled.SOLVER.STEPS == (20,)
    schedule = scaled.KD.PKD.SCHEDULE
    assert (schedule.START_ITER, schedule.WARMUP_ITERS, schedule.END_ITER) == (20, 8, 100)
    assert scaled.KD.CROSSKD.SCHEDULE.END_ITER == -1
    assert scaled.is_frozen() and cfg.KD.PKD.SCHEDULE.START_ITER == 10
    assert auto_scale_workers(cfg, 2) is cfg
    trainer = train(cfg)
    assert sorted(trainer.curve) == [0, 1] and trainer.cfg.SOLVER.REFERENCE_WORLD_SIZE == 1
    assert trainer.curve[0]["lr"] == pytest.approx(0.01)


def test_tta_is_for_two_stage_detectors(toy, tmp_path, monkeypatch):
    logging.getLogger("detectron2").setLevel(logging.INFO)
    augment = {"TEST.AUG.ENABLED": True, "TEST.AUG.MIN_SIZES": (64,), "TEST.AUG.MAX_SIZE": 64}
    keys = {**augment, "DATASETS.TEST": (toy,), "OUTPUT_DIR": str(tmp_path)}
    results = KDTrainer.test_with_tta(
        tiny_cfg("GeneralizedRCNN", **keys), tiny_model("GeneralizedRCNN")
    )
    assert set(results) == {"bbox_TTA"}
    with pytest.raises(ValueError, match="GeneralizedRCNN.*RetinaNet"):
        KDTrainer.test_with_tta(tiny_cfg("RetinaNet", **keys), tiny_model("RetinaNet"))
