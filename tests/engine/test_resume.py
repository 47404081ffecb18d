"""A resumed run continues an interrupted one bit by bit."""

import itertools
import json
import logging
import os

import pytest
import torch
from detectron2.utils import comm

from kd_d2.engine import resume
from kd_d2.engine.resume import settle_scripted_losses
from tests.engine.support import (
    THREE_DISTILLERS,
    StopAt,
    assert_same_state,
    registered_user_module,
    teacher_keys,
    train,
)
from tests.fixtures import registered_toy_dataset, tiny_cfg, tiny_model

PERIOD = 3
LAST = 2 * PERIOD


@pytest.fixture(scope="module", autouse=True)
def user_module():
    with registered_user_module():
        yield


def runs(tmp_path, meta_arch="RetinaNet", **changes):
    """Return a function that makes the config of a run in a folder, and the data set's context."""
    teacher = teacher_keys(tmp_path, meta_arch)
    settle_scripted_losses(tiny_model(meta_arch))

    def make(name, folder):
        cfg = tiny_cfg(
            meta_arch,
            **{
                **teacher,
                **THREE_DISTILLERS,
                "DATASETS.TRAIN": (name,),
                "INPUT.RANDOM_FLIP": "horizontal",
                "INPUT.MIN_SIZE_TRAIN": (64, 96),
                "MODEL.RESNETS.NORM": "BN",
                "SOLVER.MAX_ITER": LAST,
                "SOLVER.CHECKPOINT_PERIOD": PERIOD,
                "SOLVER.STEPS": (PERIOD + 1,),
                "OUTPUT_DIR": str(tmp_path / folder),
                **changes,
            },
        )
        cfg.freeze()
        return cfg

    return make


def written(folder):
    """The last line of each iteration in metrics.json, without times."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    timeless = {"time", "data_time", "rank_data_time", "eta_seconds"}
    return {
        line["iteration"]: {k: v for k, v in line.items() if k not in timeless and v == v}
        for line in lines
    }


@pytest.mark.parametrize(
    "meta_arch, changes",
    [
        ("RetinaNet", {"TEST.EVAL_PERIOD": 2}),
        ("RetinaNet", {"DATALOADER.NUM_WORKERS": 2}),
        (
            "GFL",
            {
                "TEST.PRECISE_BN.ENABLED": True,
                "TEST.PRECISE_BN.NUM_ITER": 2,
                "TEST.EVAL_PERIOD": 2,
                "KD.EVAL_TEACHER": "sample",
                "KD.EVAL_TEACHER_IMAGES": 2,
            },
        ),
    ],
    ids=["evaluation", "workers", "precise_bn"],
)
def test_resumed_run_equals_uninterrupted_one(meta_arch, changes, tmp_path):
    with registered_toy_dataset(tmp_path, 6, size=(64, 96)) as name:
        if "TEST.EVAL_PERIOD" in changes:
            changes = {**changes, "DATASETS.TEST": (name,)}
        make = runs(tmp_path, meta_arch, **changes)
        whole = train(make(name, "whole"))
        # stopped one iteration and a half after the checkpoint
        first = train(make(name, "parts"), hooks=[StopAt(PERIOD + 1)])
        assert sorted(first.curve) == list(range(PERIOD + 1))
        torch.manual_seed(123)  # whatever a new process starts with
        second = train(make(name, "parts"), resume=True)

    assert second.start_iter == PERIOD
    assert first.curve == {i: whole.curve[i] for i in range(PERIOD + 1)}
    assert second.curve == {i: whole.curve[i] for i in range(PERIOD, LAST)}
    # losses move, or nothing would have been shown
    assert len({values["total_loss"] for values in whole.curve.values()}) == LAST
    assert any("kd_raw/queue/queue" in values for values in whole.curve.values())
    final = [
        torch.load(tmp_path / folder / "model_final.pth", weights_only=True)
        for folder in ("whole", "parts")
    ]
    for state in final:
        for rank in state["trainer"]["rank_states"]["ranks"]:
            for timed in ("time", "data_time", "rank_data_time"):
                rank["curves"].pop(timed, None)
    assert_same_state(*final)
    assert final[0]["distillers"]["queue.queue"].abs().sum() > 0
    assert "queue.adapter.weight" in final[0]["distillers"]
    assert final[0]["trainer"]["rank_states"]["ranks"][0]["random"]["torch"].numel() > 0
    # medians over the last 20 iterations, some of which ran before the interruption
    assert written(tmp_path / "parts")[LAST - 1] == written(tmp_path / "whole")[LAST - 1]


def test_loss_normalizer_belongs_to_the_state(tmp_path, monkeypatch):
    """Without the plain attribute of RetinaNet the comparison above fails."""
    with registered_toy_dataset(tmp_path, 6, size=(64, 96)) as name:
        make = runs(tmp_path, **{"KD.ENABLED": False})
        whole = train(make(name, "whole"))
        assert whole.student.loss_normalizer != 100
        train(make(name, "parts"), hooks=[StopAt(PERIOD + 1)])
        monkeypatch.setattr(resume, "_restore_plain_state", lambda student, state: None)
        second = train(make(name, "parts"), resume=True)
    assert second.curve[PERIOD] != whole.curve[PERIOD]


@pytest.mark.parametrize("case", ["world_size", "foreign"])
def test_resume_without_a_matching_random_state_warns_and_continues(
    case, tmp_path, monkeypatch, caplog
):
    with registered_toy_dataset(tmp_path, 6, size=(64, 96)) as name:
        make = runs(tmp_path, **{"KD.ENABLED": False})
        cfg = make(name, "run")
        first = train(cfg, hooks=[StopAt(PERIOD)])
        path = tmp_path / "run" / f"model_{PERIOD - 1:07d}.pth"
        state = torch.load(path, weights_only=True)
        if case == "foreign":
            del state["trainer"]["rank_states"], state["trainer"]["loader"]
        else:
            state["trainer"]["rank_states"]["ranks"] *= 2
        torch.save(state, path)
        seen = []
        monkeypatch.setattr(logging.getLogger("kd_d2"), "propagate", True)

        def started(trainer):
            trainer.student.register_forward_pre_hook(
                lambda module, args: seen.append(
                    (getattr(module, "loss_normalizer", None), args[0])
                )
            )

        second = train(cfg, resume=True, started=started)
    assert sorted(second.curve) == list(range(PERIOD, LAST))
    text = caplog.text
    if case == "foreign":
        assert "holds no random state" in text
    else:
        assert "written by 2 processes, this run has 1" in text
        assert seen[0][0] == first.student.loss_normalizer
    # the data go on where they were, not at the start of the stream
    stream = itertools.islice(second.data_loader.sampler, 2 * PERIOD, 2 * LAST)
    names = [os.path.basename(x["file_name"]) for _, batch in seen for x in batch]
    assert names == [f"{index + 1:04d}.png" for index in stream]


def test_ranks_keep_their_own_state(tmp_path, monkeypatch):
    """Each rank takes the entry of its own number."""
    taken = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    monkeypatch.setattr(resume, "restore_random_state", taken.append)
    monkeypatch.setattr(resume, "_restore_plain_state", lambda student, state: taken.append(state))
    monkeypatch.setattr(resume, "_restore_curves", lambda storage, curves, start: None)

    class Loader:
        rewind = taken.append

    class Trainer:
        start_iter = 4
        storage = None
        student = torch.nn.Identity()
        data_loader = Loader
        rank_states = {
            "ranks": [
                {"random": f"random {rank}", "plain": f"plain {rank}", "curves": {}}
                for rank in range(2)
            ]
        }

        @staticmethod
        def restart_data_loader():
            taken.append("restarted")

    hook = resume.LoaderRestart(period=2)
    hook.trainer = Trainer
    hook.before_train()
    assert taken == [4, "restarted", "plain 1", "random 1"]
