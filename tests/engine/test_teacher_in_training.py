"""The teacher during training: fit for it, untouched by it, and in no file."""

import logging

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from torch import nn

from kd_d2.engine import KDTrainer, TeacherEvaluation
from kd_d2.engine.resume import settle_scripted_losses
from tests.engine.support import assert_same_state, teacher_keys, train
from tests.fixtures import CLASSES, registered_toy_dataset, tiny_cfg, tiny_model


@pytest.fixture
def config(tmp_path):
    teacher = teacher_keys(tmp_path, "GFL", **{"MODEL.RESNETS.NORM": "BN"})
    with registered_toy_dataset(tmp_path, 4, size=(64, 64)) as name:

        def make(**changes):
            values = {
                **teacher,
                "KD.ENABLED": True,
                "KD.DISTILLERS": ("CrossKD", "PKD"),
                "KD.CROSSKD.POSITION": 1,
                "DATASETS.TRAIN": (name,),
                "DATASETS.TEST": (name,),
                "INPUT.MIN_SIZE_TRAIN": (64,),
                "INPUT.MIN_SIZE_TEST": 64,
                "INPUT.RANDOM_FLIP": "horizontal",
                "OUTPUT_DIR": str(tmp_path / "output"),
            }
            return tiny_cfg("GFL", **{**values, **changes})

        yield make


@pytest.fixture
def messages(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("kd_d2"), "propagate", True)
    caplog.set_level(logging.INFO, "kd_d2")
    return caplog


def test_teacher_is_unchanged_and_nowhere(config, tmp_path):
    before = {}

    def started(trainer):
        before.update({k: v.clone() for k, v in trainer.teacher.model.state_dict().items()})

    trainer = train(config(), started=started)
    teacher = trainer.teacher.model
    assert_same_state(dict(teacher.state_dict()), before)
    assert_same_state(
        dict(teacher.state_dict()), dict(torch.load(tmp_path / "teacher.pth")["model"])
    )
    assert not any(module.training for module in teacher.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())

    theirs = {id(t) for t in teacher.state_dict(keep_vars=True).values()}
    model = trainer.kd_model
    assert not theirs & {id(p) for p in (*model.parameters(), *model.buffers())}
    assert not theirs & {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    student = tiny_model("GFL", **{"MODEL.RESNETS.NORM": "FrozenBN"})
    saved = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert set(saved["model"]) == set(student.state_dict())
    assert saved["distillers"] == {} and saved["run_info"]["classes"] == list(CLASSES)


def _without(state):
    del state["model"]["head.cls_score.bias"]


def _with(state):
    state["model"]["head.extra.weight"] = torch.zeros(2)


def _reshaped(state):
    state["model"]["head.cls_score.bias"] = torch.zeros(5)


def _renamed(state):
    state["run_info"]["classes"] = ["disc", "cross", "square"]


@pytest.mark.parametrize(
    "damage, override, listed",
    [
        (_without, "ALLOW_KEY_MISMATCH", "head.cls_score: bias"),
        (_with, "ALLOW_KEY_MISMATCH", "head.extra: weight"),
        (_reshaped, "ALLOW_KEY_MISMATCH", r"head.cls_score.bias: \(5,\).*\(3,\)"),
        (_renamed, "ALLOW_CLASS_MISMATCH", "1: student 'square', teacher 'cross'"),
    ],
)
def test_unfit_teacher_stops_the_run_unless_allowed(damage, override, listed, config, tmp_path):
    cfg = config()
    state = torch.load(cfg.KD.TEACHER.WEIGHTS)
    damage(state)
    torch.save(state, cfg.KD.TEACHER.WEIGHTS)
    with pytest.raises(ValueError, match=f"(?s){listed}.*KD.TEACHER.{override} True"):
        KDTrainer(cfg)
    cfg.KD.TEACHER[override] = True
    assert KDTrainer(cfg).teacher is not None


def test_untrained_teacher_stops_the_run_unless_allowed(config):
    cfg = config(**{"KD.TEACHER.WEIGHTS": ""})
    with pytest.raises(ValueError, match="WEIGHTS is empty.*ALLOW_UNTRAINED"):
        KDTrainer(cfg)
    cfg.KD.TEACHER.ALLOW_UNTRAINED = True
    assert "random initialisation" in KDTrainer(cfg).teacher.describe()


def test_evaluating_the_teacher_changes_nothing_but_the_log(config, messages, tmp_path):
    settle_scripted_losses(tiny_model("GFL"))
    plain = train(config(**{"OUTPUT_DIR": str(tmp_path / "plain")}))
    assert "teacher AP" not in messages.text
    changes = {"KD.EVAL_TEACHER": "sample", "KD.EVAL_TEACHER_IMAGES": 2}
    evaluated = train(config(**changes))
    assert "at most 2 images" in messages.text
    # random weights are useless, loudly
    assert "THE TEACHER'S AP" in messages.text and "nothing to teach" in messages.text
    assert evaluated.curve == plain.curve
    assert_same_state(dict(evaluated.student.state_dict()), dict(plain.student.state_dict()))


class _Oracle(nn.Module):
    """A detector that knows the answers."""

    def __init__(self, name):
        super().__init__()
        self.records = {x["image_id"]: x for x in DatasetCatalog.get(name)}
        self.seen = []

    def forward(self, inputs):
        results = []
        for x in inputs:
            torch.rand(3)
            self.seen.append(x["image_id"])
            annotations = self.records[x["image_id"]]["annotations"]
            instances = Instances((x["height"], x["width"]))
            boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32)
            boxes[:, 2:] += boxes[:, :2]
            instances.pred_boxes = Boxes(boxes)
            instances.scores = torch.ones(len(boxes))
            instances.pred_classes = torch.tensor([a["category_id"] for a in annotations])
            results.append({"instances": instances})
        return results


@pytest.mark.parametrize("mode, images", [("sample", 3), ("full", 4)])
def test_a_perfect_teacher_has_ap_100(mode, images, config, messages):
    cfg = config(**{"KD.EVAL_TEACHER": mode, "KD.EVAL_TEACHER_IMAGES": 3, "SOLVER.MAX_ITER": 1})
    oracles = []

    def started(trainer):
        oracles.append(_Oracle(cfg.DATASETS.TEST[0]))
        hook = next(h for h in trainer._hooks if isinstance(h, TeacherEvaluation))
        hook._teacher = type("Perfect", (), {"cfg": trainer.teacher.cfg, "model": oracles[0]})

    trainer = train(cfg, started=started)
    assert len(set(oracles[0].seen)) == len(oracles[0].seen) == images
    scalar = trainer.storage.history(f"teacher/{cfg.DATASETS.TEST[0]}/AP").latest()
    assert scalar == pytest.approx(100.0)
    assert "nothing to teach" not in messages.text and "100.00" in messages.text
