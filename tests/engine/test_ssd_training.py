"""SSD in the real trainer: steps, resumption, evaluation, export."""

import math

import pytest
import torch
from detectron2.config import get_cfg as get_plain_cfg

from kd_d2.config import get_cfg
from kd_d2.engine import KDTrainer
from kd_d2.export import export_student
from tests.engine.support import train
from tests.fixtures import registered_toy_dataset, save_weights, tiny_cfg, tiny_model


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    # neither square nor of the network's size
    with registered_toy_dataset(tmp_path_factory.mktemp("data"), 6, size=(90, 140)) as name:
        yield name


def _cfg(dataset, folder, **overrides):
    return tiny_cfg(
        "SSD",
        **{
            "DATASETS.TRAIN": (dataset,),
            "DATASETS.TEST": (dataset,),
            "OUTPUT_DIR": str(folder),
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "SOLVER.MAX_ITER": 4,
            "MODEL.SSD_VGG.NORM": "BN",
            "MODEL.SSD.SCORE_THRESH_TEST": 0.0,
            **overrides,
        },
    )


def test_training_resumes_exactly(dataset, tmp_path):
    """Four steps at once, and two and two; the augmentation's random numbers included."""
    whole = train(_cfg(dataset, tmp_path / "whole"))
    assert sorted(whole.curve) == [0, 1, 2, 3]
    for values in whole.curve.values():
        assert {"loss_ssd_cls", "loss_ssd_box"} < set(values)
        assert all(math.isfinite(v) for v in values.values())
        assert values["loss_ssd_cls"] > 0 and values["loss_ssd_box"] > 0
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "model_0000001.pth").rename(tmp_path / "part" / "model_0000001.pth")
    (tmp_path / "part" / "last_checkpoint").write_text("model_0000001.pth")
    resumed = train(_cfg(dataset, tmp_path / "part"), resume=True)
    assert sorted(resumed.curve) == [2, 3]
    for iteration, values in resumed.curve.items():
        assert values == whole.curve[iteration]
    for key, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[key]), key

    results = KDTrainer.test(whole.cfg, whole.student)
    assert set(results["bbox"]) > {"AP", "AP50"}


def test_kd_switched_off_is_plain_training(dataset, tmp_path):
    """The same YAML with a distiller, KD.ENABLED False: the curve of a config without KD."""
    plain = train(_cfg(dataset, tmp_path / "plain", **{"SOLVER.MAX_ITER": 2}))
    off = {"SOLVER.MAX_ITER": 2, "KD.DISTILLERS": ("PKD",), "KD.ENABLED": False}
    switched_off = train(_cfg(dataset, tmp_path / "off", **off))
    assert plain.curve == switched_off.curve


def test_distillation_with_weight_zero_changes_nothing(dataset, tmp_path):
    """Another SSD as teacher through the whole machine; student and images stay the same."""
    teacher_cfg = _cfg(dataset, tmp_path)
    (tmp_path / "teacher.yaml").write_text(teacher_cfg.dump())
    model = tiny_model("SSD", **{"MODEL.SSD_VGG.NORM": "BN"})
    save_weights(model, tmp_path / "teacher.pth")
    distilled = train(
        _cfg(
            dataset,
            tmp_path / "kd",
            **{
                "SOLVER.MAX_ITER": 2,
                "KD.ENABLED": True,
                "KD.DISTILLERS": ("FitNets",),
                "KD.FITNETS.WEIGHT": 0.0,
                "KD.TEACHER.CONFIG_FILE": str(tmp_path / "teacher.yaml"),
                "KD.TEACHER.WEIGHTS": str(tmp_path / "teacher.pth"),
            },
        )
    )
    plain = train(_cfg(dataset, tmp_path / "plain", **{"SOLVER.MAX_ITER": 2}))
    for iteration, values in plain.curve.items():
        for name in ("loss_ssd_cls", "loss_ssd_box"):
            assert distilled.curve[iteration][name] == pytest.approx(values[name], rel=1e-5)
        assert distilled.curve[iteration]["kd_raw/fitnets/feat"] > 0


def test_exported_student_is_the_student(dataset, tmp_path):
    """export_student itself compares the detections of what it wrote."""
    cfg = _cfg(dataset, tmp_path)
    model = tiny_model("SSD", **{"MODEL.SSD_VGG.NORM": "BN"})
    weights = save_weights(model, tmp_path / "run" / "model.pth")
    export = export_student(cfg, weights, str(tmp_path / "export"))
    assert export.packages == ["kd_d2.modeling"] and export.dropped == 0
    assert export.num_detections > 0
    assert export.num_parameters == sum(p.numel() for p in model.parameters())
    written = get_cfg()
    written.merge_from_file(export.files[-1])
    # as text: YAML makes lists of tuples
    assert written.MODEL.SSD.dump() == cfg.MODEL.SSD.dump()
    assert written.MODEL.SSD_VGG.dump() == cfg.MODEL.SSD_VGG.dump()
    assert written.INPUT.MAPPER == "SSDMapper" and not written.KD.ENABLED
    assert "SSD" not in get_plain_cfg().MODEL
