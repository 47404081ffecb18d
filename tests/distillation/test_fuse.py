"""Batch norms inside the convs of a teacher: the same outputs, the state of the file."""

import logging

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from kd_d2.distillation import DetectorTeacher, ModuleRecorder, freeze
from kd_d2.distillation.fuse import FusedNorm, fuse_norms
from tests.fixtures import tiny_batch, tiny_cfg, tiny_model

# relative; 2e-6 were measured with all degenerate channels of below, and none is near to it
TOLERANCE = 1e-4
NORMS = {"FrozenBN": {}, "BN": {"MODEL.RESNETS.NORM": "BN", "MODEL.FPN.NORM": "BN"}}


@torch.no_grad()
def _model(name="RetinaNet", **overrides):
    """A frozen detector whose norms are not the identity; dead and tiny channels among them."""
    model = freeze(tiny_model(name, **overrides))
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            for value in (module.weight, module.bias, module.running_mean):
                value.normal_(generator=generator)
            module.running_var.uniform_(0.2, 2, generator=generator)
            module.weight[0], module.weight[1], module.weight[2] = 0.0, 1e-30, 1e-42
    return model


def _state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def _relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("norm", NORMS)
def test_outputs_agree_and_the_state_is_that_of_before(norm):
    model = _model(**NORMS[norm])
    before, images = _state(model), torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        expected = model.backbone(images)
        # the convs of ResNet-18; with "BN" the six around the pyramid, too
        assert fuse_norms(model) == {"FrozenBN": 20, "BN": 26}[norm]
        for channels_last in (False, True):
            if channels_last:
                model.to(memory_format=torch.channels_last)
            for level, value in model.backbone(images).items():
                assert _relative(value, expected[level]) < TOLERANCE
            after = model.state_dict()
            assert list(after) == list(before)
            for key, value in before.items():
                assert after[key].dtype == value.dtype and torch.equal(after[key], value), key


def test_norms_give_what_they_gave():
    model, images = _model(), torch.randn(1, 3, 64, 64)
    paths = [f"backbone.bottom_up.res3.0.shortcut{end}" for end in ("", ".norm")]
    values = []
    with torch.no_grad():
        for _ in range(2):
            with ModuleRecorder(model, paths) as recorder:
                model.backbone(images)
            values.append([recorder.single(path).output for path in paths])
            fuse_norms(model)
    for now, then in zip(*reversed(values)):
        assert _relative(now, then) < TOLERANCE


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_by_hand(bias, dtype):
    """(2 * 3 + b - 1) / sqrt(4) * 0.5 + 7 with b = 5 or 0."""
    norm = FrozenBatchNorm2d(1, eps=0.0)
    for name, value in {"weight": 0.5, "bias": 7, "running_mean": 1, "running_var": 4}.items():
        getattr(norm, name).fill_(value)
    conv = Conv2d(1, 1, 1, bias=bias, norm=norm)
    nn.init.constant_(conv.weight, 2)
    if bias:
        nn.init.constant_(conv.bias, 5)
    conv = freeze(conv.to(dtype))
    assert fuse_norms(conv) == 1
    expected = 0.25 * (6 + (5 if bias else 0) - 1) + 7
    assert conv(torch.full((1, 1, 1, 1), 3.0, dtype=dtype)).item() == pytest.approx(expected)
    assert conv.weight.item() == 0.5 and ("bias" in conv.state_dict()) == bias
    assert conv.state_dict()["weight"].item() == 2


def test_what_must_not_be_touched():
    class Shifted(FrozenBatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    class Doubled(Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    kinds = {
        "batch statistics": Conv2d(3, 4, 1, norm=nn.BatchNorm2d(4)).train(),
        "no statistics": Conv2d(3, 4, 1, norm=nn.BatchNorm2d(4, track_running_stats=False)).eval(),
        "groups": Conv2d(3, 4, 1, norm=nn.GroupNorm(2, 4)).eval(),
        "derived norm": Conv2d(3, 4, 1, norm=Shifted(4)).eval(),
        "derived conv": Doubled(3, 4, 1, norm=FrozenBatchNorm2d(4)).eval(),
        "none": Conv2d(3, 4, 1).eval(),
    }
    for kind, conv in kinds.items():
        norm = conv.norm
        assert fuse_norms(conv) == 0 and conv.norm is norm, kind


def test_a_norm_that_two_convs_share():
    norm = FrozenBatchNorm2d(4)
    nn.init.uniform_(norm.weight)
    model = freeze(nn.Sequential(Conv2d(4, 4, 1, norm=norm), Conv2d(4, 4, 1, norm=norm)))
    x = torch.randn(1, 4, 2, 2)
    expected, before = model(x), _state(model)
    assert fuse_norms(model) == 2
    torch.testing.assert_close(model(x), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_loading_into_a_fused_network_is_an_error():
    model = _model()
    state = _state(model)
    fuse_norms(model)
    with pytest.raises(RuntimeError, match="FUSE_BN"):
        model.load_state_dict(state)


def _built(tmp_path, caplog, **values):
    model = _model()
    torch.save({"model": model.state_dict()}, tmp_path / "teacher.pth")
    teacher_cfg = tiny_cfg("RetinaNet")
    (tmp_path / "teacher.yaml").write_text(teacher_cfg.dump())
    cfg = tiny_cfg(
        "RetinaNet",
        **{
            "KD.TEACHER.CONFIG_FILE": str(tmp_path / "teacher.yaml"),
            "KD.TEACHER.WEIGHTS": str(tmp_path / "teacher.pth"),
            **values,
        },
    )
    with caplog.at_level(logging.INFO, logger="kd_d2"):
        return DetectorTeacher(cfg), model


def test_a_teacher_is_fused_and_detects_the_same(tmp_path, caplog):
    teacher, plain = _built(tmp_path, caplog)
    assert any("20 batch norms" in message for message in caplog.messages)
    assert any(isinstance(module, FusedNorm) for module in teacher.model.modules())
    assert not any(module.training for module in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    weight = teacher.model.head.cls_score.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    state = teacher.state_to_copy()
    for key, value in plain.state_dict().items():
        assert torch.equal(state[key], value), key

    batch = tiny_batch()
    with torch.no_grad():
        pairs = list(zip(teacher.model(batch), plain(batch)))
    for ours, theirs in pairs:
        ours, theirs = ours["instances"], theirs["instances"]
        assert len(ours) == len(theirs) > 0
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            ours.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=1e-4, atol=1e-2
        )


def test_a_teacher_that_is_left_as_it_is(tmp_path, caplog):
    off = {"KD.TEACHER.FUSE_BN": False, "KD.TEACHER.CHANNELS_LAST": False}
    teacher, plain = _built(tmp_path, caplog, **off)
    assert not any(isinstance(module, FusedNorm) for module in teacher.model.modules())
    assert teacher.model.head.cls_score.weight.is_contiguous()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = teacher.model.backbone(images), plain.backbone(images)
    assert all(torch.equal(ours[level], theirs[level]) for level in theirs)
