"""A broken loss stops the run before it reaches the weights, and is named."""

import pytest
import torch
from detectron2.engine import HookBase

from kd_d2.baselines import PKD
from kd_d2.engine.train_loop import check_finite
from tests.engine.support import teacher_keys, train
from tests.fixtures import registered_toy_dataset, tiny_cfg


class Weights(HookBase):
    def before_step(self):
        self.iteration = self.trainer.iter
        state = self.trainer.student.named_parameters()
        self.before = {key: value.detach().clone() for key, value in state}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("checked", [True, False])
def test_broken_term_stops_before_the_step(value, checked, tmp_path, monkeypatch):
    compute = PKD.compute

    def broken(self, ctx):
        terms = compute(self, ctx)
        return {"feat": terms["feat"] * value} if ctx.iteration == 1 else terms

    monkeypatch.setattr(PKD, "compute", broken)
    weights, trainers = Weights(), []
    with registered_toy_dataset(tmp_path, 4, size=(64, 64)) as name:
        keys = {
            "KD.ENABLED": True,
            "KD.DISTILLERS": ("PKD",),
            "KD.CHECK_FINITE": checked,
            "DATASETS.TRAIN": (name,),
            "SOLVER.CHECKPOINT_PERIOD": 2,
            "INPUT.MIN_SIZE_TRAIN": (64,),
            "OUTPUT_DIR": str(tmp_path / "output"),
            **teacher_keys(tmp_path, "RetinaNet"),
        }
        with pytest.raises(FloatingPointError) as error:
            train(tiny_cfg("RetinaNet", **keys), hooks=[weights], started=trainers.append)
    message = str(error.value)
    if checked:
        listed = message.split("Seen on rank")[0]
        assert "at iteration 1" in listed and "loss_kd/pkd/feat" in listed
        assert "loss_cls" not in listed and "rank 0 of 1" in message
    else:
        assert "iteration=1" in message and "Loss became infinite" in message  # Detectron2's own
    assert weights.iteration == 1
    for key, value in trainers[0].student.named_parameters():
        assert torch.equal(value, weights.before[key]), key
    assert not list((tmp_path / "output").glob("model_*.pth"))


def test_check_finite_accepts_finite_losses():
    check_finite({"a": torch.tensor(1e30), "b": torch.tensor(0.0, dtype=torch.float16)}, 3)
    with pytest.raises(FloatingPointError, match="iteration 3: b .here inf.*Seen"):
        check_finite({"a": torch.tensor(1.0), "b": torch.tensor(float("inf"))}, 3)
