"""Training of the classifier: it learns, resumes exactly, and says what it stored."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser

from kd_d2.distillation import build_teacher
from kd_d2.projects.dicod.teacher import load_classifier
from tests.distributed.test_two_processes import assert_close
from tests.engine import support
from tests.fixtures import registered_toy_dataset, tiny_cfg
from tests.projects.dicod import classifier_workers
from tests.projects.dicod.crop_cases import CLASSES, classifier_cfg

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "projects/DICOD/train_classifier.py"


def script():
    spec = importlib.util.spec_from_file_location("train_classifier", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(folder, name, output="output", stop_at=None, resume=False, **changes):
    """12 crops, 4 a batch: 3 iterations an epoch; returns the trainer with its curve."""
    values = {
        "OUTPUT_DIR": str(folder / output),
        "CROP_CLASSIFIER.EPOCHS": 2,
        "CROP_CLASSIFIER.DROP_EPOCHS": (1,),
        "CROP_CLASSIFIER.BASE_LR": 0.001,
        **changes,
    }
    cfg = classifier_cfg(folder, name, **values)
    hooks = [support.StopAt(stop_at)] if stop_at else []
    return support.train(cfg, script().ClassifierTrainer, resume, hooks)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with registered_toy_dataset(folder, 6, CLASSES) as name:
        yield name


@pytest.mark.parametrize("mode", ["object", "online"])
def test_resume_reproduces_the_loss_curve(dataset, tmp_path, mode):
    online = {
        "CROP_CLASSIFIER.MODE": "online",
        "CROP_CLASSIFIER.SHUFFLE_BUFFER": 6,
        "INPUT.MIN_SIZE_TRAIN": (96, 128),
    }
    changes = online if mode == "online" else {}
    whole = train(tmp_path, dataset, "whole", **changes)
    # evaluation, which shuffles nothing, ran after every epoch in both
    interrupted = train(tmp_path, dataset, "parts", stop_at=4, **changes)
    resumed = train(tmp_path, dataset, "parts", resume=True, **changes)
    assert sorted(whole.curve) == list(range(6)) and sorted(interrupted.curve) == list(range(4))
    assert resumed.curve == {i: whole.curve[i] for i in (3, 4, 5)}
    assert whole.curve[3]["total_loss"] != whole.curve[0]["total_loss"]
    states = [torch.load(tmp_path / n / "model_final.pth")["model"] for n in ("whole", "parts")]
    support.assert_same_state(*states)


def test_schedule_and_metrics(dataset, tmp_path):
    trainer = train(tmp_path, dataset)
    rates = [trainer.curve[i]["lr"] for i in range(6)]
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 3)
    assert trainer.max_iter == 6 and isinstance(trainer.optimizer, torch.optim.Adam)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 1e-4
    for values in trainer.curve.values():
        parts = values["loss_cross_entropy"] + values["loss_focal"]
        assert values["total_loss"] == pytest.approx(parts, rel=1e-5)
    lines = [json.loads(x) for x in (tmp_path / "output" / "metrics.json").open()]
    written = {key for line in lines for key in line}
    assert {"classifier/top1", f"{dataset}/top1", f"{dataset}/top5", "eta_seconds"} <= written
    assert {f.name for f in (tmp_path / "output").glob("model_*")} == {
        "model_0000002.pth",
        "model_0000005.pth",
        "model_final.pth",
    }


def test_checkpoint_says_what_a_teacher_must_know(dataset, tmp_path):
    changes = {"CROP_CLASSIFIER.EPOCHS": 1, "CROP_CLASSIFIER.OPTIMIZER": "sgd"}
    trainer = train(tmp_path, dataset, **changes)
    assert trainer.optimizer.param_groups[0]["momentum"] == 0.9
    file = tmp_path / "output" / "model_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    facts = trainer.student.metadata()
    assert facts["classes"] == CLASSES and facts["losses"] == ["cross_entropy", "focal"]
    assert {key: checkpoint["run_info"][key] for key in facts} == facts
    model = load_classifier(str(file))
    support.assert_same_state(dict(model.state_dict()), dict(trainer.student.state_dict()))
    assert torch.equal(model.pixel_std, trainer.student.pixel_std)
    teacher = build_teacher(
        tiny_cfg(
            "RetinaNet",
            **{
                "KD.TEACHER.TYPE": "ClassifierTeacher",
                "KD.TEACHER.WEIGHTS": str(file),
                "KD.TEACHER.CLASSIFIER.ARCH": "resnet18",
                "KD.TEACHER.CLASSIFIER.INPUT_SIZE": 32,
            },
        )
    )
    assert teacher.classes == CLASSES


def test_it_learns(dataset, tmp_path):
    """The classes of the toy data are colours: 12 crops are learnt in a few epochs."""
    changes = {
        "CROP_CLASSIFIER.EPOCHS": 12,
        "CROP_CLASSIFIER.DROP_EPOCHS": (10,),
        "CROP_CLASSIFIER.EVAL_EPOCHS": 12,
        "CROP_CLASSIFIER.CHECKPOINT_EPOCHS": 0,
        "CROP_CLASSIFIER.BATCH_SIZE": 6,
    }
    trainer = train(tmp_path, dataset, **changes)
    results = trainer._last_eval_results[dataset]
    # rectangles hide each other in part
    assert results["top1"] > 80 and results["top5"] == 100 and results["crops"] == 12
    assert trainer.student.training

    args = default_argument_parser().parse_args(
        [
            *(
                "--eval-only",
                "DATASETS.TRAIN",
                f"('{dataset}',)",
                "DATASETS.TEST",
                f"('{dataset}',)",
            ),
            *("MODEL.WEIGHTS", str(tmp_path / "output" / "model_final.pth")),
            *("MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "eval"), "INPUT.FORMAT", "RGB"),
            *("MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]", "DATALOADER.NUM_WORKERS", "0"),
            *("MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]", "CROP_CLASSIFIER.ARCH", "resnet18"),
            *("CROP_CLASSIFIER.INDEX_DIR", str(tmp_path / "index")),
        ]
    )
    with pytest.raises(ValueError, match="with input_size 32, the config says 112"):
        script().prepare(args)
    args.opts += ["CROP_CLASSIFIER.INPUT_SIZE", "32"]
    assert script().prepare(args)() == {dataset: results}


def test_evaluation_counts(dataset, tmp_path, monkeypatch):
    """Class 0 always wins, class 2 is second: of 4 crops each, 4 are right, also in the top 1."""
    module = script()
    cfg = classifier_cfg(tmp_path, dataset)
    model = module.build_classifier(cfg, CLASSES).train()
    monkeypatch.setattr(
        type(model),
        "logits",
        lambda self, crops: torch.tensor([3.0, 1, 2]).repeat(len(crops), 1),
    )
    state = torch.get_rng_state()
    result = module.evaluate(cfg, model)[dataset]
    assert result == {"top1": pytest.approx(100 / 3), "top5": 100.0, "crops": 12.0}
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_resuming_with_another_config_is_refused(dataset, tmp_path):
    train(tmp_path, dataset, stop_at=4)
    with pytest.raises(ValueError, match="trained with input_size 32, the config says 40"):
        train(tmp_path, dataset, resume=True, **{"CROP_CLASSIFIER.INPUT_SIZE": 40})


def test_the_students_training_keys_are_not_the_classifiers(dataset, tmp_path):
    student = {
        "SOLVER.BASE_LR": 7.0,
        "SOLVER.MAX_ITER": 5,
        "SOLVER.WARMUP_ITERS": 100,
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "SOLVER.REFERENCE_WORLD_SIZE": 8,
        "SOLVER.AMP.ENABLED": True,
        "MODEL.WEIGHTS": "a_detector.pth",
        "KD.ENABLED": True,
        "TEST.AUG.ENABLED": True,
        "TEST.PRECISE_BN.ENABLED": True,
    }
    cfg = script().with_schedule(classifier_cfg(tmp_path, dataset, **student))
    assert cfg.SOLVER.BASE_LR == 1e-4 and cfg.SOLVER.MAX_ITER == 270
    assert cfg.SOLVER.STEPS == (150,) and cfg.SOLVER.GAMMA == 0.1 and cfg.SOLVER.WARMUP_ITERS == 0
    assert cfg.SOLVER.CHECKPOINT_PERIOD == cfg.TEST.EVAL_PERIOD == 3
    assert not (cfg.SOLVER.CLIP_GRADIENTS.ENABLED or cfg.SOLVER.AMP.ENABLED or cfg.KD.ENABLED)
    assert not (cfg.TEST.AUG.ENABLED or cfg.TEST.PRECISE_BN.ENABLED or cfg.MODEL.WEIGHTS)
    assert cfg.SOLVER.REFERENCE_WORLD_SIZE == 0
    with pytest.raises(ValueError, match="OPTIMIZER must be one of .* got 'lamb'"):
        train(tmp_path, dataset, **{"CROP_CLASSIFIER.OPTIMIZER": "lamb"})


def test_evaluation_on_other_classes_is_refused_at_once(dataset, tmp_path):
    with registered_toy_dataset(tmp_path, 1, CLASSES[::-1]) as other:
        cfg = classifier_cfg(tmp_path, dataset, **{"DATASETS.TEST": (dataset, other)})
        with pytest.raises(ValueError, match="3 classes, the classifier 3; .*'cross', 'disc'"):
            script().with_schedule(cfg)


# --------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with registered_toy_dataset(folder, 6, CLASSES) as name:
        (folder / "name.txt").write_text(name)
        support.data_module(folder / "data.py", name)
        program = ROOT / "tests/projects/dicod/classifier_workers.py"
        code, output = support.run_program([program, folder], timeout=500)
    assert code == 0, output[-4000:]
    return [torch.load(folder / f"rank{rank}.pth") for rank in range(2)] + [folder]


@pytest.mark.distributed
def test_two_processes_equal_one_with_both_batches(ranks):
    batches = [classifier_workers.batch(rank) for rank in range(2)]
    together = [torch.cat(part) for part in zip(*batches)]
    alone = classifier_workers.gradients(*together, distributed=False)
    for rank in ranks[:2]:
        assert_close(rank["step"]["gradients"], alone["gradients"])
    for name, value in alone["losses"].items():
        values = [rank["step"]["losses"][name] for rank in ranks[:2]]
        assert sum(values) / 2 == pytest.approx(value, rel=1e-5) and values[0] != values[1]


@pytest.mark.distributed
def test_two_processes_train_alike_and_resume_exactly(ranks):
    first, second, folder = ranks
    for run in ("whole", "resumed"):
        for name, value in first["whole"]["parameters"].items():
            assert torch.equal(value, first[run]["parameters"][name]), name
            assert torch.equal(value, second[run]["parameters"][name]), name
    assert first["resumed"]["curve"] == {i: first["whole"]["curve"][i] for i in (3, 4, 5)}
    # both evaluated the model that is stored, each its own part of all crops
    assert first["whole"]["results"] == second["whole"]["results"]
    (result,) = first["whole"]["results"].values()
    assert result["crops"] == 12
    saved = torch.load(folder / "whole" / "model_final.pth", weights_only=True)
    for rank in (first, second):
        for name, value in rank["whole"]["buffers"].items():
            if name in saved["model"]:
                assert torch.equal(saved["model"][name], value), name
