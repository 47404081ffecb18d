"""The backbone equals Detectron2's where both exist; what it adds; configs and checkpoints."""

import re

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone

from kd_d2.checkpoint import KDCheckpointer, MissingFileError, load_checkpoint_file
from kd_d2.config import get_cfg
from kd_d2.engine.main import build_config
from kd_d2.export import export_student
from kd_d2.projects.jointdetnas import MorphResNet, parse, resolve
from kd_d2.projects.jointdetnas.morph_blocks import MorphBlock
from kd_d2.projects.jointdetnas.morph_resnet import find_pyramid, resolve_encoding
from kd_d2.projects.jointdetnas.space import Block
from tests.fixtures import tiny_batch
from tests.projects.jointdetnas.cases import (
    ALL,
    BOTTLENECK,
    MOVED,
    STEM,
    bottom_up,
    detections,
    images,
    morph_options,
    pyramid,
    randomise_norms,
    relative_difference,
    student,
    student_cfg,
)


def narrow_d2(depth):
    """Detectron2's network, the deep ones at an eighth of the width, and the same encoding."""
    share = 1 if depth == 18 else 8  # Detectron2 refuses a narrow R-18
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 64 // share
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth == 18 else 256 // share
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 64 // share
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    text = re.sub(r"\d+", lambda m: str(int(m.group()) // share), str(resolve(f"r{depth}")))
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)), parse(text, 64 // share)


@pytest.mark.parametrize("depth", [18, 50, 101])
def test_equals_detectron2(depth):
    """Strict load, then the same outputs bit by bit, on an odd size, in both modes."""
    reference, architecture = narrow_d2(depth)
    randomise_norms(reference)
    ours = MorphResNet(architecture, out_features=("stem", "res2", "res3", "res4", "res5"))
    ours.load_state_dict(reference.state_dict(), strict=True)
    assert ours.output_shape() == reference.output_shape()
    x = images(77, 101)
    for training in (False, True):
        theirs, found = reference.train(training)(x), ours.train(training)(x)
        assert all(torch.equal(theirs[name], found[name]) for name in theirs)
    theirs, found = dict(reference.named_modules()), dict(ours.named_modules())
    for name, a in theirs.items():
        if isinstance(a, torch.nn.Conv2d):
            b = found[name]
            assert (a.stride, a.padding, a.groups) == (b.stride, b.padding, b.groups)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("r18", 11_176_512),
        ("r50", 23_508_032),
        ("r101", 42_500_160),
        ("searched_r18", 11_102_528),
        ("searched_r50", 19_393_448),
        ("searched_r101", 23_901_254),
    ],
)
def test_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = MorphResNet(resolve(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_identity_at_stride_2_keeps_every_second_pixel():
    block = MorphBlock(Block((4, 6), False), 6, stride=2, norm="BN")
    torch.nn.init.zeros_(block.conv2.norm.weight)
    for height, width in [(8, 6), (7, 5), (1, 2)]:
        x = torch.rand(2, 6, height, width)
        out = block.eval()(x)
        assert torch.equal(out, x[:, :, ::2, ::2])
        assert out.shape[-2:] == (-(-height // 2), -(-width // 2))
    assert block.shortcut is None and "shortcut" not in dict(block.named_children())


def test_forced_projection_and_groups():
    model = MorphResNet(parse(ALL["forced"], STEM))
    assert model.res3[1].shortcut is not None and model.res3[2].shortcut is None
    assert model.res3[1].shortcut.weight.shape == (24, 24, 1, 1)
    grouped = MorphResNet(parse(ALL["grouped"], STEM))
    assert grouped.res2[0].conv2.groups == 4 and grouped.res2[0].conv1.groups == 1
    assert grouped.res2[0].conv2.weight.shape == (8, 2, 3, 3)
    assert [conv.out_channels for conv in grouped.res3[1].convs] == [6, 6, 24]


@pytest.mark.parametrize("name", sorted(ALL))
def test_maps_have_the_channels_and_strides_of_the_encoding(name):
    model = student(ALL[name])
    shapes = bottom_up(model).output_shape()
    architecture = parse(ALL[name], STEM)
    assert [s.channels for s in shapes.values()] == [
        blocks[-1].out_channels for blocks in architecture.stages
    ]
    assert [s.stride for s in shapes.values()] == [4, 8, 16, 32]
    maps = bottom_up(model)(images(97, 131))
    for stage, (feature, shape) in enumerate(zip(maps.values(), shapes.values())):
        side = 4 * 2**stage
        assert feature.shape == (2, shape.channels, -(-97 // side), -(-131 // side))
    # the pyramid's laterals follow
    for level, shape in zip(range(2, 6), shapes.values()):
        assert getattr(model.backbone, f"fpn_lateral{level}").in_channels == shape.channels


def test_trains_and_detects():
    model = student(MOVED).train()
    from detectron2.utils.events import EventStorage

    with EventStorage(0):
        losses = model(tiny_batch(sizes=((97, 131), (64, 96))))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in bottom_up(model).parameters())
    assert len(detections(model)[0]["instances"]) > 0


def test_freezing_follows_the_config():
    model = student(MOVED, **{"MODEL.BACKBONE.FREEZE_AT": 2})
    body = bottom_up(model)
    assert isinstance(body.res2[0].conv1.norm, FrozenBatchNorm2d)
    assert not any(p.requires_grad for p in body.res2.parameters())
    assert all(p.requires_grad for p in body.res3.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"MODEL.RESNETS.STRIDE_IN_1X1": True}, "STRIDE_IN_1X1 must be False .* got True"),
        ({"MODEL.RESNETS.RES5_DILATION": 2}, "RES5_DILATION must be 1 .* got 2"),
        (
            {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True]},
            "DEFORM_ON_PER_STAGE must be False",
        ),
        ({"MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4"]}, "must contain 'res5'"),
        ({"MODEL.MORPH_RESNET.ENCODING": "r19"}, "MODEL.MORPH_RESNET.ENCODING: 'r19' is neither"),
        (
            {"MODEL.MORPH_RESNET.ENCODING": "[(4,5,16)-(4,5,16)],[(4)],[],[]"},
            "ENCODING: stage 3 block 1",
        ),
    ],
)
def test_wrong_keys_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build_model(student_cfg(**options))


def test_basic_blocks_do_not_care_where_a_bottleneck_has_its_stride():
    build_model(student_cfg(ALL["basic"], **{"MODEL.RESNETS.STRIDE_IN_1X1": True}))


# --------------------------------------------------------------------------- configs, checkpoints
@pytest.fixture
def saved(tmp_path):
    """A student of the encoding MOVED and its checkpoint."""
    model = student(MOVED)
    model.backbone.bottom_up.architecture = parse(MOVED, STEM).with_blocks(
        {(3, 0): Block((5, 4, 28), False, age=2)}
    )
    KDCheckpointer(model, str(tmp_path)).save("model_final", iteration=7)
    return model, str(tmp_path / "model_final.pth")


def test_checkpoint_says_what_it_is(saved):
    data = load_checkpoint_file(saved[1])
    assert data["arch"] == {
        "version": 1,
        "encoding": MOVED,
        "stem": STEM,
        "fpn": 12,
        "age": [100] * 6 + [2, 100, 100],
    }
    # nothing of it is among the weights: plain Detectron2 can read them
    assert set(data["model"]) == set(saved[0].state_dict())
    assert all(isinstance(value, torch.Tensor) for value in data["model"].values())


def test_checkpoint_loads_into_its_encoding(saved):
    model, path = saved
    other = student(MOVED, seed=5)
    rest = KDCheckpointer(other).load(path)
    assert rest["iteration"] == 7
    x = images()
    assert relative_difference(pyramid(model, x), pyramid(other, x)) == 0
    assert bottom_up(other).architecture.block((3, 0)).age == 2


@pytest.mark.parametrize(
    "encoding, more, message",
    [
        (MOVED.replace("(5,4,28)", "(5,5,28)"), {}, r"stage 4 block 1 is \(5,4,28\) .*\(5,5,28\)"),
        # all shapes that exist on both sides agree: only the entry tells
        (MOVED.replace("-(6,9,28)", ""), {}, "stage 3 has 2 blocks against 1"),
        (MOVED.replace("-(7,6,36)", "-(7,6,36)-(7,6,36)"), {}, "stage 4 has 3 blocks against 4"),
        (MOVED, {"MODEL.FPN.OUT_CHANNELS": 16}, "pyramid has 12 channels, .*OUT_CHANNELS is 16"),
        (MOVED, {"MODEL.RESNETS.STEM_OUT_CHANNELS": 6}, "stem has 8 channels against 6"),
    ],
)
def test_checkpoint_of_another_encoding_is_refused(saved, encoding, more, message):
    other = student(encoding, **more)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=f"does not belong to the model of the config.*{message}"):
        KDCheckpointer(other).load(saved[1])
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_refusal_when_evaluating_with_train_net(saved, tmp_path):
    """By the code that train_net.py runs; the same config with "auto" evaluates."""
    from detectron2.engine import default_argument_parser

    from kd_d2.engine.main import prepare

    def arguments(encoding):
        config = tmp_path / "config.yaml"
        config.write_text(student_cfg(encoding).dump())
        return default_argument_parser().parse_args(
            [
                *("--eval-only", "--config-file", str(config), "MODEL.WEIGHTS", saved[1]),
                *("OUTPUT_DIR", str(tmp_path / "out")),
            ]
        )

    with pytest.raises(ValueError, match="stage 1 block 1 is .*Set it to 'auto', or to"):
        prepare(arguments(BOTTLENECK.replace("(4,5,16)", "(4,4,16)", 1)))
    assert prepare(arguments("auto"))() == {}  # no data set: nothing to evaluate
    # the copy of the config beside the results has the encoding itself
    assert MOVED in (tmp_path / "out" / "config.yaml").read_text().replace("\n", "").replace(
        " ", ""
    )


def test_auto_takes_the_encoding_of_the_file(saved):
    model, path = saved
    cfg = student_cfg("auto", **{"MODEL.WEIGHTS": path})
    other = build_model(cfg)
    KDCheckpointer(other).load(path)
    assert bottom_up(other).architecture == parse(MOVED, STEM)
    theirs, ours = detections(other)[0]["instances"], detections(model)[0]["instances"]
    assert len(ours) > 0 and torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    resolve_encoding(cfg)
    assert cfg.MODEL.MORPH_RESNET.ENCODING == MOVED


def test_auto_needs_a_file_with_an_entry(saved, tmp_path):
    plain = tmp_path / "plain.pth"
    torch.save({"model": saved[0].state_dict()}, plain)
    with pytest.raises(ValueError, match="ENCODING: 'auto', but .*plain.pth has no entry arch"):
        build_model(student_cfg("auto", **{"MODEL.WEIGHTS": str(plain)}))
    with pytest.raises(ValueError, match="stem of .* has 8 channels, .* is 6"):
        options = {"MODEL.WEIGHTS": saved[1], "MODEL.RESNETS.STEM_OUT_CHANNELS": 6}
        build_model(student_cfg("auto", **options))
    missing = student_cfg("auto", **{"MODEL.WEIGHTS": str(tmp_path / "no.pth")})
    resolve_encoding(missing)
    assert missing.MODEL.MORPH_RESNET.ENCODING == "auto"
    with pytest.raises(MissingFileError, match="is 'auto', but MODEL.WEIGHTS .*no.pth"):
        build_model(missing)


def test_configs_are_resolved_only_for_this_backbone():
    name = ["MODEL.BACKBONE.NAME", "build_morph_resnet_fpn_backbone"]
    encoding = ["MODEL.MORPH_RESNET.ENCODING", "searched_r18"]
    resolved = build_config(opts=name + encoding)
    assert resolved.MODEL.MORPH_RESNET.ENCODING == str(resolve("searched_r18"))
    assert build_config(opts=encoding).MODEL.MORPH_RESNET.ENCODING == "searched_r18"
    with pytest.raises(ValueError, match="'rx' is neither"):
        build_config(opts=[*name, "MODEL.MORPH_RESNET.ENCODING", "rx"])


def test_weights_without_an_entry(saved, tmp_path):
    """A classifier's weights may lack keys, but another shape is a mistake."""
    state = saved[0].state_dict()
    body = {k: v for k, v in state.items() if k.startswith("backbone.bottom_up.res2")}
    torch.save({"model": body}, tmp_path / "part.pth")
    other = student(MOVED, seed=3)
    KDCheckpointer(other).load(str(tmp_path / "part.pth"))
    assert torch.equal(
        other.state_dict()["backbone.bottom_up.res2.0.conv1.weight"],
        state["backbone.bottom_up.res2.0.conv1.weight"],
    )
    wide = student(MOVED.replace("(4,5,16)", "(4,6,16)"))
    with pytest.raises(
        ValueError, match="does not fit the backbone .*\n1[^\0]*res2.0.conv2.weight"
    ):
        torch.save(
            {"model": {k: v for k, v in body.items() if k.endswith("2.0.conv2.weight")}},
            tmp_path / "part.pth",
        )
        KDCheckpointer(wide).load(str(tmp_path / "part.pth"))


def test_missing_backbone_keys_beside_an_entry_are_refused(saved, tmp_path):
    data = load_checkpoint_file(saved[1])
    del data["model"]["backbone.bottom_up.res4.1.conv2.norm.weight"]
    torch.save(data, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="does not fit the backbone[^\0]*res4.1.conv2.norm"):
        KDCheckpointer(student(MOVED)).load(str(tmp_path / "cut.pth"))
    # a head of other classes is trained anew, as with Detectron2
    data = load_checkpoint_file(saved[1])
    del data["model"]["roi_heads.box_predictor.cls_score.weight"]
    torch.save(data, tmp_path / "head.pth")
    KDCheckpointer(student(MOVED)).load(str(tmp_path / "head.pth"))


def test_export_of_a_searched_student(saved, tmp_path):
    cfg = student_cfg("auto", **{"MODEL.WEIGHTS": saved[1]})
    result = export_student(cfg, saved[1], str(tmp_path / "exported"))
    assert result.packages == ["kd_d2.projects.jointdetnas"] and result.num_detections > 0
    assert load_checkpoint_file(result.files[0])["arch"]["encoding"] == MOVED


def test_single_blocks_need_quotes_in_a_config(tmp_path):
    """yacs would read a tuple; what is written into a config is read as a text again."""
    from kd_d2.projects.jointdetnas.presets import config_text

    text = "[(4,5,16)],[(6,5,24)],[(8,7,28)],[(9,8,36)]"
    architecture = parse(text, STEM)
    assert config_text(architecture) == f'"{text}"' and config_text(parse(MOVED, STEM)) == MOVED
    cfg = student_cfg(f"\"'{text}'\"")
    resolve_encoding(cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = build_config(str(tmp_path / "config.yaml"))
    assert bottom_up(build_model(again)).architecture == architecture
    with pytest.raises(ValueError, match="ENCODING"):
        student_cfg(text)


def test_pyramid_is_found():
    model = student(MOVED)
    assert find_pyramid(model) is model.backbone
    assert find_pyramid(bottom_up(model)) is None
    # without a pyramid the entry says 0
    assert bottom_up(model).architecture_entry(bottom_up(model))["fpn"] == 0
    assert (
        morph_options("x")["MODEL.FPN.OUT_CHANNELS"]
        == bottom_up(model).architecture_entry(model)["fpn"]
    )


@pytest.mark.parametrize("name", sorted(ALL))
def test_finite_and_close_under_autocast(name):
    model = student(ALL[name])
    exact = pyramid(model, images())
    with torch.autocast("cpu", torch.bfloat16):
        half = pyramid(model, images())
    assert all(torch.isfinite(v).all() for v in half.values())
    assert relative_difference(exact, {k: v.float() for k, v in half.items()}) < 0.1
