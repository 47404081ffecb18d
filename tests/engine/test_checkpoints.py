"""A checkpoint is a plain detector's, and evaluation needs nothing else."""

import builtins
import os
import subprocess
import sys

import pytest
import torch
from detectron2.engine import default_argument_parser

from kd_d2.distillation import teacher as teacher_module
from kd_d2.engine import KDTrainer, main
from tests.engine.support import data_module, teacher_keys, train, write_yaml
from tests.fixtures import registered_toy_dataset, tiny_batch, tiny_cfg

DETECTRON2_ALONE = """
import sys
sys.modules["kd_d2"] = None  # any import of it fails
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
folder = sys.argv[1]
for name in sys.argv[2:]:
    cfg = get_cfg()
    cfg.merge_from_file(f"{folder}/{name}.yaml")
    model = build_model(cfg)
    file = f"{folder}/{name}/model_final.pth"
    model.load_state_dict(torch.load(file, weights_only=True)["model"], strict=True)
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(file)
    inputs = torch.load(f"{folder}/inputs.pth", weights_only=True)
    with torch.no_grad():
        outputs = [x["instances"] for x in model(inputs)]
    fields = [
        {"boxes": x.pred_boxes.tensor, "scores": x.scores, "classes": x.pred_classes}
        for x in outputs
    ]
    torch.save(fields, f"{folder}/{name}/detections.pth")
assert not any(name.startswith("kd_d2.") for name in sys.modules)
"""


def test_checkpoints_load_strictly_into_detectron2_alone(tmp_path):
    inputs = [{k: x[k] for k in ("image", "height", "width")} for x in tiny_batch()]
    torch.save(inputs, tmp_path / "inputs.pth")
    distillers = {"RetinaNet": ("CrossKD", "PKD"), "GeneralizedRCNN": ("PKD",)}
    expected = {}
    torch.set_num_threads(1)
    with registered_toy_dataset(tmp_path, 4, size=(64, 64)) as name:
        for meta_arch, names in distillers.items():
            low = {
                "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
                "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
            }
            write_yaml(tmp_path / f"{meta_arch}.yaml", tiny_cfg(meta_arch, **low))
            changes = {
                "KD.ENABLED": True,
                "KD.DISTILLERS": names,
                "KD.CROSSKD.POSITION": 1,
                "DATASETS.TRAIN": (name,),
                "OUTPUT_DIR": str(tmp_path / meta_arch),
                "SOLVER.MAX_ITER": 1,
            }
            teacher = teacher_keys(tmp_path / f"{meta_arch}_teacher", meta_arch)
            cfg = tiny_cfg(meta_arch, **{**low, **changes, **teacher})
            student = train(cfg).student.eval()
            with torch.no_grad():
                expected[meta_arch] = [x["instances"] for x in student(inputs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DETECTRON2_ALONE, str(tmp_path), *distillers],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for meta_arch, instances in expected.items():
        detections = torch.load(tmp_path / meta_arch / "detections.pth")
        assert sum(len(x) for x in instances) > 0
        for ours, theirs in zip(instances, detections):
            torch.testing.assert_close(ours.pred_boxes.tensor, theirs["boxes"])
            torch.testing.assert_close(ours.scores, theirs["scores"])
            assert torch.equal(ours.pred_classes, theirs["classes"])


@pytest.fixture
def trained(tmp_path):
    """Command line of a run whose teacher's files are not there any more."""
    with registered_toy_dataset(tmp_path, 4, size=(64, 64)) as name:
        cfg = tiny_cfg(
            "RetinaNet",
            **{
                "DATASETS.TRAIN": (name,),
                "DATASETS.TEST": (name,),
                "OUTPUT_DIR": str(tmp_path / "output"),
                "SOLVER.MAX_ITER": 1,
                "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
            },
        )
        train(cfg)
        config_file = write_yaml(
            tmp_path / "run.yaml",
            cfg,
            **{
                "KD.ENABLED": True,
                "KD.DISTILLERS": ("CrossKD", "PKD"),
                "KD.EVAL_TEACHER": "full",
                "KD.INIT_STUDENT.PREFIXES": ("head",),
                "KD.TEACHER.CONFIG_FILE": "gone/teacher.yaml",
                "KD.TEACHER.WEIGHTS": str(tmp_path / "gone" / "teacher.pth"),
                "KD.IMPORTS": (data_module(tmp_path / "data.py", name),),
            },
        )
        yield ["--config-file", config_file, "--eval-only"]


@pytest.mark.parametrize("how", ["weights", "resume"])
def test_eval_only_opens_no_file_of_the_teacher(how, trained, tmp_path, monkeypatch):
    opened = []
    real_open = builtins.open

    def spy(file, *args, **kwargs):
        opened.append(str(file))
        return real_open(file, *args, **kwargs)

    def fail(*args):
        raise AssertionError("a teacher was built")

    weights = tmp_path / "output" / "model_final.pth"
    arguments = ["--resume"] if how == "resume" else ["MODEL.WEIGHTS", str(weights)]
    args = default_argument_parser().parse_args(trained + arguments)
    evaluated = []
    test = KDTrainer.test.__func__
    monkeypatch.setattr(
        KDTrainer,
        "test",
        classmethod(lambda cls, cfg, model: evaluated.append(model) or test(cls, cfg, model)),
    )
    monkeypatch.setattr(teacher_module, "build_teacher", fail)
    monkeypatch.setattr("kd_d2.engine.trainer.build_teacher", fail)
    monkeypatch.setattr(builtins, "open", spy)
    results = main.main(args)
    assert "AP" in results["bbox"]
    assert any(name.endswith("run.yaml") for name in opened)
    assert not any("gone" in name or "teacher" in os.path.basename(name) for name in opened)
    saved = torch.load(weights, weights_only=True)["model"]
    state = evaluated[0].state_dict()
    assert all(torch.equal(state[key], value) for key, value in saved.items())
