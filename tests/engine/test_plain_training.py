"""With KD off, training is Detectron2's own; with weights of zero, the student's is."""

import pytest
import torch
from detectron2.config import get_cfg as get_d2_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model

from kd_d2.engine import KDTrainer
from kd_d2.engine.main import build_config
from kd_d2.engine.resume import settle_scripted_losses
from tests.engine.support import assert_same_state, teacher_keys, train, write_yaml
from tests.fixtures import registered_toy_dataset, tiny_cfg, tiny_model


@pytest.fixture
def toy(tmp_path):
    with registered_toy_dataset(tmp_path, 6, size=(64, 96)) as name:
        yield name


def run(cfg, trainer_class, folder):
    """Train; return the losses, the learning rates and everything that was saved."""
    # in one process the first of two runs would be the only one to see the focal loss unoptimised
    settle_scripted_losses(build_model(cfg))
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)
    folder.mkdir()
    trainer = train(cfg, trainer_class)
    saved = torch.load(folder / "model_final.pth", weights_only=False)
    return trainer.curve, saved


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("meta_arch", ["RetinaNet", "GeneralizedRCNN"])
def test_kd_off_is_bit_identical_to_detectron2(meta_arch, workers, toy, tmp_path):
    changes = {
        "DATASETS.TRAIN": (toy,),
        "DATALOADER.NUM_WORKERS": workers,
        "INPUT.RANDOM_FLIP": "horizontal",
        "INPUT.MIN_SIZE_TRAIN": (64, 80, 96),
        "MODEL.RESNETS.NORM": "BN",
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.STEPS": (2,),
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.01,
        "SOLVER.WEIGHT_DECAY_BIAS": 0.01,
    }
    config_file = write_yaml(tmp_path / "plain.yaml", tiny_cfg(meta_arch, **changes))
    theirs = get_d2_cfg()
    theirs.merge_from_file(config_file)
    ours = build_config(config_file)
    assert not ours.KD.ENABLED
    curve, saved = run(theirs, DefaultTrainer, tmp_path / "d2")
    our_curve, our_saved = run(ours, KDTrainer, tmp_path / "kd")

    assert sorted(curve) == [0, 1, 2] and len({v["lr"] for v in curve.values()}) > 1
    assert our_curve == curve
    assert_same_state(dict(our_saved["model"]), dict(saved["model"]))
    assert any("running_mean" in key for key in saved["model"])
    assert our_saved["iteration"] == saved["iteration"]
    optimizer, our_optimizer = (s["trainer"]["_trainer"]["optimizer"] for s in (saved, our_saved))
    assert_same_state(our_optimizer, optimizer)
    scheduler, our_scheduler = (s["trainer"]["hooks"]["LRScheduler"] for s in (saved, our_saved))
    assert_same_state(our_scheduler, scheduler)


KD = {
    "KD.ENABLED": True,
    "KD.DISTILLERS": ("CrossKD", "PKD"),
    "KD.CROSSKD.POSITION": 1,
    "INPUT.RANDOM_FLIP": "horizontal",
    "MODEL.RESNETS.NORM": "BN",
}
ZERO = {"KD.CROSSKD.CLS_WEIGHT": 0.0, "KD.CROSSKD.REG_WEIGHT": 0.0, "KD.PKD.WEIGHT": 0.0}


@pytest.mark.parametrize("meta_arch", ["RetinaNet", "GFL"])
def test_student_starts_and_sees_the_same_with_kd_on_and_off(meta_arch, toy, tmp_path):
    teacher = teacher_keys(tmp_path, meta_arch)
    first_weights, batches, last_weights, curves = {}, {}, {}, {}
    settle_scripted_losses(tiny_model(meta_arch))
    for case, changes in {
        "off": {"KD.ENABLED": False},
        "zero": ZERO,
        "on": {},
    }.items():
        output = {"OUTPUT_DIR": str(tmp_path / case), "DATASETS.TRAIN": (toy,)}
        cfg = tiny_cfg(meta_arch, **{**teacher, **KD, **output, **changes})
        cfg.freeze()
        batches[case] = []

        def started(trainer):
            student = trainer.student
            first_weights[case] = {k: v.clone() for k, v in student.state_dict().items()}
            student.register_forward_pre_hook(
                lambda _, args: batches[case].extend((x["file_name"], x["image"]) for x in args[0])
            )

        trainer = train(cfg, started=started)
        last_weights[case] = dict(trainer.student.state_dict())
        curves[case] = trainer.curve

    for case in ("zero", "on"):
        assert_same_state(first_weights[case], first_weights["off"])
        assert_same_state(batches[case], batches["off"])
    assert len(batches["off"]) == 6
    # nothing but the losses of distillation distinguishes the cases
    assert_same_state(last_weights["zero"], last_weights["off"])
    for iteration, values in curves["off"].items():
        theirs = curves["zero"][iteration]
        assert {key: theirs[key] for key in values} == values
        assert {k: v for k, v in theirs.items() if k.startswith("loss_kd/")} == dict.fromkeys(
            ["loss_kd/crosskd/cls", "loss_kd/crosskd/reg", "loss_kd/pkd/feat"], 0.0
        )
    changed = [
        k for k, v in last_weights["on"].items() if not torch.equal(v, last_weights["off"][k])
    ]
    assert any(key.startswith("backbone.") for key in changed)
