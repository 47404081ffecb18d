"""Mixed precision: finite losses, and the terms of distillation in fp32."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from kd_d2.distillation import KDModel, build_distillers, build_tap
from kd_d2.engine import KDTrainer
from tests.engine.support import teacher_keys, train
from tests.fixtures import registered_toy_dataset, teacher_of, tiny_batch, tiny_cfg, tiny_model

KD = {"KD.ENABLED": True, "KD.DISTILLERS": ("CrossKD", "PKD"), "KD.CROSSKD.POSITION": 1}


@pytest.mark.parametrize("meta_arch", ["RetinaNet", "GFL"])
def test_bf16_autocast_on_the_cpu(meta_arch):
    cfg = tiny_cfg(meta_arch, **KD)
    student = tiny_model(meta_arch)
    teacher = teacher_of(tiny_cfg(meta_arch))
    distillers, _ = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    model = KDModel(student=student, distillers=distillers, teacher=teacher).train()
    results = {}
    for enabled in (False, True):
        recorded = []
        student.head.cls_subnet[0].register_forward_hook(lambda *args: recorded.append(args[2]))
        model.zero_grad()
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = model(tiny_batch())
            sum(losses.values()).backward()
        assert recorded[0].dtype == (torch.bfloat16 if enabled else torch.float32)
        assert all(torch.isfinite(loss) for loss in losses.values())
        ours = {k: v for k, v in losses.items() if k.startswith("loss_kd/")}
        assert len(ours) == 3 and all(v.dtype == torch.float32 for v in ours.values())
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
        results[enabled] = {k: v.item() for k, v in ours.items()}
    assert results[True] == pytest.approx(results[False], rel=0.1)
    assert results[True] != results[False]


def test_scaler_and_precision_reach_the_step(monkeypatch):
    made = []
    monkeypatch.setattr(
        "kd_d2.engine.trainer.CheckedAMPTrainer",
        lambda *args, precision: made.append((args, precision)),
    )
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        amp = {"SOLVER.AMP.ENABLED": True, "SOLVER.AMP.PRECISION": name, "MODEL.DEVICE": "cuda"}
        KDTrainer.build_step(tiny_cfg("RetinaNet", **amp), "model", "loader", "optimizer")
        assert made.pop() == (("model", "loader", "optimizer"), dtype)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_200_iterations_in_mixed_precision(precision, tmp_path):
    teacher = teacher_keys(tmp_path, "GFL")
    with registered_toy_dataset(tmp_path, 16) as name:
        cfg = tiny_cfg(
            "GFL",
            **{
                **KD,
                **teacher,
                "MODEL.DEVICE": "cuda",
                "DATASETS.TRAIN": (name,),
                "SOLVER.AMP.ENABLED": True,
                "SOLVER.AMP.PRECISION": precision,
                "SOLVER.BASE_LR": 0.005,
                "SOLVER.MAX_ITER": 200,
                "SOLVER.WARMUP_ITERS": 50,
                "KD.PKD.WEIGHT": 1.0,
                "OUTPUT_DIR": str(tmp_path / "output"),
            },
        )
        trainer = train(cfg)
    totals = [values["total_loss"] for values in trainer.curve.values()]
    assert len(totals) == 200 and all(map(lambda x: x < float("inf"), totals))
    assert sum(totals[-20:]) < 0.8 * sum(totals[:20])
    saved = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    assert all(v.dtype == torch.float32 for v in saved["model"].values() if v.is_floating_point())
    assert ("scale" in saved["trainer"]["_trainer"]["grad_scaler"]) or precision == "bfloat16"
