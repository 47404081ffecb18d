"""KD.INIT_STUDENT: parts of the student that come from the teacher."""

import pytest
import torch

from kd_d2.engine import KDTrainer
from kd_d2.engine.init_student import copy_from_teacher
from tests.engine.support import StopAt, teacher_keys, train
from tests.fixtures import registered_toy_dataset, tiny_cfg, tiny_model

PREFIXES = ("head.cls_subnet", "backbone.bottom_up.res5")


@pytest.fixture
def config(tmp_path):
    """A function from changed keys to a config whose teacher has BatchNorm of its own."""
    norm = {"MODEL.RESNETS.NORM": "BN"}
    teacher = teacher_keys(tmp_path, "RetinaNet", **norm)
    state = torch.load(teacher["KD.TEACHER.WEIGHTS"])
    for key in state["model"]:
        if key.endswith("running_mean"):
            state["model"][key] += 0.5
    torch.save(state, teacher["KD.TEACHER.WEIGHTS"])
    with registered_toy_dataset(tmp_path, 4, size=(64, 64)) as name:
        yield lambda **changes: tiny_cfg(
            "RetinaNet",
            **{
                **norm,
                **teacher,
                "DATASETS.TRAIN": (name,),
                "OUTPUT_DIR": str(tmp_path / "output"),
                "SOLVER.CHECKPOINT_PERIOD": 1,
                "SOLVER.BASE_LR": 0.01,
                "INPUT.MIN_SIZE_TRAIN": (64,),
                "KD.ENABLED": True,
                "KD.DISTILLERS": ("PKD",),
                "KD.INIT_STUDENT.PREFIXES": PREFIXES,
                **changes,
            },
        ), state["model"]


def copied(state):
    return {key: value.clone() for key, value in state.items() if key.startswith(PREFIXES)}


def test_copied_at_the_start_trained_later_and_not_copied_on_resume(config):
    make, teacher = config
    expected = copied(teacher)
    start = {}
    kept = tiny_model("RetinaNet", seed=3, **{"MODEL.RESNETS.NORM": "BN"}).state_dict()

    def started(trainer):
        start.update({k: v.clone() for k, v in trainer.student.state_dict().items()})

    trainer = train(make(), hooks=[StopAt(2)], started=started)
    for key, value in expected.items():
        assert torch.equal(start[key], value), key
    others = [key for key in kept if key not in expected and key.endswith("weight")]
    assert not all(torch.equal(start[key], teacher[key]) for key in others)
    trained = dict(trainer.student.state_dict())
    for key in ("head.cls_subnet.0.weight", "backbone.bottom_up.res5.0.conv1.norm.running_mean"):
        assert not torch.equal(trained[key], expected[key]), key

    def resumed(trainer):
        assert trainer.start_iter == 2
        for key, value in trainer.student.state_dict().items():
            assert torch.equal(value, trained[key]), key

    train(make(), resume=True, started=resumed)


def test_frozen_parts_stay_bit_by_bit(config):
    make, teacher = config
    cfg = make(**{"KD.INIT_STUDENT.FREEZE": True, "TEST.EVAL_PERIOD": 1})
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN  # ends with model.train()
    trainer = train(cfg)
    expected, result = copied(teacher), trainer.student.state_dict()
    assert any(key.endswith("running_mean") for key in expected)
    for key, value in expected.items():
        assert torch.equal(result[key], value), key
    names = {id(p): name for name, p in trainer.student.named_parameters()}
    optimised = {names[id(p)] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {n for n in names.values() if not n.startswith(PREFIXES)}
    # the rest is trained, statistics included
    moved = "backbone.bottom_up.res4.0.conv1.norm.running_mean"
    assert not torch.equal(result[moved], torch.zeros_like(result[moved]))
    # the file is that of any detector
    saved = torch.load(cfg.OUTPUT_DIR + "/model_final.pth", weights_only=True)["model"]
    plain = tiny_model("RetinaNet", **{"MODEL.RESNETS.NORM": "BN"})
    plain.load_state_dict(saved, strict=True)


@pytest.mark.parametrize("freeze", [False, True])
def test_prefix_without_match(freeze, config):
    cfg = config[0](
        **{"KD.INIT_STUDENT.PREFIXES": ("head.cls_tower",), "KD.INIT_STUDENT.FREEZE": freeze}
    )
    with pytest.raises(ValueError, match="student starts with 'head.cls_tower'\n.*teacher starts"):
        trainer = KDTrainer(cfg)
        trainer.resume_or_load(resume=False)


def test_kd_off_ignores_the_node(config):
    make, teacher = config
    changes = {"KD.ENABLED": False, "KD.INIT_STUDENT.FREEZE": True}
    cfg = make(**changes, **{"KD.TEACHER.WEIGHTS": "nowhere.pth"})
    trainer = KDTrainer(cfg)
    trainer.resume_or_load(resume=False)
    state = trainer.student.state_dict()
    assert not any(
        torch.equal(state[k], v) for k, v in copied(teacher).items() if k.endswith("conv1.weight")
    )
    assert all(p.requires_grad for p in trainer.student.parameters())


def test_every_difference_is_in_one_message():
    student = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "other": torch.nn.Linear(1, 1)})
    teacher = {"a.weight": torch.zeros(4, 2), "a.scale": torch.zeros(4), "c.weight": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        copy_from_teacher(student, teacher, ["a.", "b", "c"])
    lines = str(caught.value).split("\n- ")
    assert "('a.', 'b', 'c') cannot be copied" in lines[0]
    lines[-1], end = lines[-1].split("\n")
    assert set(lines[1:]) == {
        "'a.weight' has shape (3, 2) in the student and (4, 2) in the teacher",
        "the teacher has no 'a.bias'",
        "the student has no 'a.scale'",
        "the student has no 'c.weight'",
        "no parameter or buffer of the student starts with 'b'",
        "no parameter or buffer of the teacher starts with 'b'",
        "no parameter or buffer of the student starts with 'c'",
    }
    assert "drop the prefixes" in end
