"""Every recipe on COCO takes two training steps: its own YAML with small networks and images."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from kd_d2.engine import KDTrainer
from kd_d2.engine.main import build_config
from kd_d2.engine.optimizer import FullModelClippedSGD, build_optimizer
from tests.fixtures import tiny_batch

COCO = Path(__file__).parents[3] / "projects/CrossKD/configs/COCO"
# Detectors, losses, heads with 4 stages and 80 classes stay; backbones and widths shrink.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.FPN.OUT_CHANNELS", "64", "MODEL.MOBILENET_V2.WIDTH_MULT", "0.25"),
    *("MODEL.SWIN.EMBED_DIM", "12", "MODEL.SWIN.NUM_HEADS", "(1, 2, 3, 4)"),
    *("MODEL.SWIN.DEPTHS", "(1, 1, 1, 1)", "MODEL.SWIN.WINDOW_SIZE", "4"),
]


def _config(row, opts=(), teacher_opts=()):
    return build_config(
        str(COCO / f"{row}.yaml"),
        [
            *SMALL,
            *("KD.TEACHER.OPTS", repr((*SMALL, *teacher_opts))),
            *("KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_UNTRAINED", "True", "SEED", "3"),
            *opts,
        ],
    )


def _distinct_rows():
    """One of the recipes that are equal when the depth of the backbones does not count."""
    found = {}
    for path in sorted(COCO.glob("*.yaml")):
        cfg = _config(path.stem).clone()
        cfg.defrost()
        teacher = Path(cfg.KD.TEACHER.CONFIG_FILE).stem
        cfg.KD.TEACHER.CONFIG_FILE = "swin" if "swin" in teacher else ""
        found.setdefault((cfg.MODEL.dump(), cfg.KD.dump()), path.stem)
    return sorted(found.values())


def _copy(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def _two_steps(cfg):
    """Train as the trainer does, without its data and hooks; return what can be looked at."""
    seed_all_rng(2)  # numpy's generator, too: the teacher's seed comes from it
    model = KDTrainer.build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    student, teacher = _copy(model.student), _copy(model.teacher.model)
    losses = []
    with EventStorage(0) as storage:
        for step in range(2):
            found = model(tiny_batch(sizes=((64, 96), (64, 64)), num_classes=80, seed=step))
            optimizer.zero_grad()
            sum(found.values()).backward()
            optimizer.step()
            storage.step()
            losses.append({name: value.item() for name, value in found.items()})

    for found in losses:
        assert all(math.isfinite(value) for value in found.values()), found
        kd = {name: value for name, value in found.items() if name.startswith("loss_kd/")}
        assert kd and all(value > 0 for value in kd.values()), kd
    assert set(losses[0]) == set(losses[1]) > set(kd)
    trained = model.student.state_dict()
    assert all(torch.isfinite(value).all() for value in trained.values())
    for part in ("backbone.bottom_up", "backbone.fpn", "head.cls_subnet", "head.bbox_subnet"):
        assert any(
            not torch.equal(trained[k], v) for k, v in student.items() if k.startswith(part)
        ), part
    assert not model.teacher.model.training
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())
    for name, value in model.teacher.model.state_dict().items():
        assert torch.equal(value, teacher[name]), name
    return model, optimizer, kd


@pytest.mark.parametrize("row", _distinct_rows())
def test_recipe(row):
    cfg = _config(row)
    model, optimizer, kd = _two_steps(cfg)
    labels = {name.split("/")[1] for name in kd}
    assert labels == {name.lower() for name in cfg.KD.DISTILLERS}
    clips = cfg.MODEL.META_ARCHITECTURE == "FCOS" or row in ("table5_fitnets", "table7_fgd")
    assert isinstance(optimizer, FullModelClippedSGD) == clips
    assert ("loss_kd/crosskd/ctr" in kd) == (row in ("atss_r50_r101_1x", "table8_atss_cross_pkd"))


@pytest.mark.parametrize(
    "row", ["gfl_r18_r50_1x", "retinanet_r18_r50_1x", "fcos_r50_r101_2x", "atss_r50_r101_1x"]
)
def test_preset_of_the_paper(row):
    """Eq. 4 and 5 literally: other normalisers and regions, other values."""
    paper = _two_steps(_config(row, ["KD.CROSSKD.PRESET", "paper"]))[2]
    official = _two_steps(_config(row))[2]
    for name in ("loss_kd/crosskd/cls", "loss_kd/crosskd/reg"):
        assert paper[name] != pytest.approx(official[name], rel=1e-2)


def test_fcos_of_detectron2():
    preset = ("MODEL.FCOS.PRESET", "d2")
    cfg = _config("fcos_r50_r101_2x", preset, preset)
    model, _, kd = _two_steps(cfg)
    crosskd = model.distillers["crosskd"]
    assert crosskd.preset.reg_loss == "giou" and set(crosskd.positions.values()) == {2}
    assert set(kd) == {"loss_kd/crosskd/cls", "loss_kd/crosskd/reg"}
    assert model.student.head.ctrness is not None and model.student.head.scales is None


@pytest.mark.parametrize(
    "row, opts",
    [
        ("retinanet_r18_r50_1x", ()),
        ("fcos_r50_r101_2x", ("MODEL.FCOS.NORMALIZER", "ema")),
    ],
)
def test_moving_average(row, opts):
    _two_steps(_config(row, [*opts, "KD.CROSSKD.NORMALIZER", "ema"]))


def test_sides_of_heterogeneous_pairs():
    """What teaches what, by the class of the bottom-up network."""
    for row, student, teacher in (
        ("retinanet_r50_swin_t_1x", "ResNet", "Swin"),
        ("retinanet_mobilenet_v2_r50_1x", "MobileNetV2", "ResNet"),
    ):
        model = KDTrainer.build_model(_config(row))
        assert type(model.student.backbone.bottom_up).__name__ == student
        assert type(model.teacher.model.backbone.bottom_up).__name__ == teacher


@pytest.mark.parametrize(
    "opts, teacher_opts, message",
    [
        ((), ("MODEL.GFL.NUM_CONVS", "3"), r"\(NUM_CONVS\) is 4 in the student and 3 in the"),
        ((), ("MODEL.GFL.NUM_CLASSES", "20"), r"\(NUM_CLASSES\) is 80 in the student and 20 in"),
        (("KD.CROSSKD.POSITION", "6"), (), r"KD.CROSSKD.POSITION .* 0\.\.5 .*got 6"),
        (("KD.CROSSKD.NORMALIZER", "ema"), (), 'KD.CROSSKD.NORMALIZER is "ema", but the student'),
    ],
)
def test_mistakes_stop_the_trainer_while_it_is_built(opts, teacher_opts, message):
    with pytest.raises(ValueError, match=message):
        KDTrainer.build_model(_config("gfl_r18_r50_1x", opts, teacher_opts))
