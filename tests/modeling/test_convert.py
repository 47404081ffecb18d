"""Conversion of foreign checkpoints: features of both sides agree, names come back."""

import math
from pathlib import Path

import pytest
import torch
import torchvision
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import nn

from kd_d2.config import get_cfg
from kd_d2.engine.main import build_config
from kd_d2.modeling.backbone import MobileNetV2, Swin, build_ssd_vgg_backbone
from kd_d2.modeling.convert import (
    RETINANET_ANCHOR_ORDER,
    compare_with_model,
    convert_detectron2,
    convert_mmdetection,
    convert_torchvision,
    fill_from_model,
    permute_anchors,
    unwrap_state_dict,
)

FPN_LEVELS = ["res3", "res4", "res5"]


def randomised(model, seed=0):
    """All parameters and statistics away from their neutral values, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.rand(value.shape, generator=generator)
            if name.endswith("running_var") or value.dim() == 1 and name.endswith("weight"):
                value.copy_(0.5 + noise)
            elif value.dim() == 1:
                value.copy_(noise - 0.5)
    return model.eval()


def detector_cfg(meta_arch, norm="FrozenBN"):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = meta_arch
    cfg.MODEL.BACKBONE.NAME = "build_kd_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = FPN_LEVELS
    cfg.MODEL.FPN.IN_FEATURES = FPN_LEVELS
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [
        [4 * s * 2 ** (i / 3) for i in range(3)] for s in (8, 16, 32, 64, 128)
    ]
    for name in ("RETINANET", "FCOS", "GFL", "ATSS"):
        cfg.MODEL[name].NUM_CLASSES = 6
    return cfg


# torchvision


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_features_agree(depth):
    torch.manual_seed(0)
    reference = randomised(getattr(torchvision.models, f"resnet{depth}")(weights=None))
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    ours = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    result = convert_torchvision(reference.state_dict(), prefix="")
    assert result.source == "torchvision ResNet" and not result.unused
    assert set(result.used) | set(result.dropped) == set(reference.state_dict())
    assert {k for k in result.dropped if not k.endswith("batches_tracked")} == {
        "fc.weight",
        "fc.bias",
    }
    ours.load_state_dict(fill_from_model(result, ours.state_dict()).state_dict)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        y = reference.maxpool(reference.relu(reference.bn1(reference.conv1(x))))
        outputs = ours(x)
        for stage in range(1, 5):
            y = getattr(reference, f"layer{stage}")(y)
            torch.testing.assert_close(outputs[f"res{stage + 1}"], y, rtol=1e-4, atol=1e-4)


def test_mobilenet_v2_features_agree():
    torch.manual_seed(0)
    reference = randomised(torchvision.models.mobilenet_v2(weights=None))
    result = convert_torchvision(reference.state_dict(), prefix="")
    assert result.source == "torchvision MobileNetV2" and not result.unused
    ours = MobileNetV2().eval()
    ours.load_state_dict(fill_from_model(result, ours.state_dict()).state_dict)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x)["res5"], reference.features(x))


def test_swin_t_features_agree():
    torch.manual_seed(0)
    reference = torchvision.models.swin_t(weights=None).eval()
    with torch.no_grad():  # biases and norms away from 0 and 1
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    result = convert_torchvision(reference.state_dict(), prefix="")
    assert result.source == "torchvision Swin Transformer" and not result.unused
    ours = Swin().eval()
    comparison = compare_with_model(result, ours.state_dict())
    assert comparison.fits
    assert set(comparison.initial) == {f"norm{i}.{p}" for i in (1, 2) for p in ("weight", "bias")}
    ours.load_state_dict(result.state_dict, strict=False)
    nn.Module.train(ours, False)
    # The last stage is 8 x 9 tokens: maps smaller than a window (7) are shifted by Detectron2
    # only. Odd sizes in between exercise the padding of patch merging.
    x = torch.randn(1, 3, 232, 264)
    with torch.no_grad():
        outputs = ours(x)
        y = reference.features[:4](x).permute(0, 3, 1, 2)
        normed = torch.nn.functional.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2])
        torch.testing.assert_close(
            outputs["res3"], normed.permute(0, 3, 1, 2), rtol=1e-3, atol=1e-4
        )
        last = reference.norm(reference.features(x)).permute(0, 3, 1, 2)
    torch.testing.assert_close(outputs["res5"], last, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def vgg16():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.vgg16(weights=None, num_classes=2).eval()
        nn.init.normal_(model.classifier[0].bias)
        nn.init.normal_(model.classifier[3].bias)
    return model


def _ssd_vgg():
    cfg = get_cfg()
    return build_ssd_vgg_backbone(cfg, ShapeSpec(channels=3)).eval()


def test_vgg16_of_caffe_for_ssd(vgg16):
    """Features agree on images minus the mean; conv6 and conv7 are left to their initialisation."""
    state = vgg16.state_dict()
    # torchvision's file of these weights has such a classifier
    state = {k: v * float("nan") if "classifier" in k else v for k, v in state.items()}
    result = convert_torchvision(state, prefix="")
    assert result.source == "torchvision VGG16 (features)" and not result.unused
    assert set(result.dropped) == {k for k in state if k.startswith("classifier")}
    ours = _ssd_vgg()
    comparison = compare_with_model(result, ours.state_dict())
    assert comparison.fits and "features.31.weight" in comparison.initial
    assert {k.split(".")[0] for k in comparison.initial} == {"features", "extras", "l2norm"}
    ours.load_state_dict(result.state_dict, strict=False)
    x = torch.randn(1, 3, 64, 96) * 50
    with torch.no_grad():
        torch.testing.assert_close(ours.features[:30](x), vgg16.features[:30](x))


def test_vgg16_of_torchvision_for_ssd(vgg16):
    """The std is in the first weights; conv6 and conv7 are the decimated classifier."""
    state = vgg16.state_dict()
    result = convert_torchvision(state, prefix="")
    assert result.source == "torchvision VGG16 (v1)" and not result.unused
    assert set(result.dropped) == {"classifier.6.weight", "classifier.6.bias"}
    ours = _ssd_vgg()
    comparison = compare_with_model(result, ours.state_dict())
    assert comparison.fits
    assert {k.split(".")[0] for k in comparison.initial} == {"extras", "l2norm"}
    ours.load_state_dict(result.state_dict, strict=False)
    x = torch.randn(1, 3, 64, 96) * 50
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    with torch.no_grad():
        expected = vgg16.features[:30](x / std)
        torch.testing.assert_close(ours.features[:30](x), expected, rtol=1e-4, atol=1e-4)

    fc6, fc7 = state["classifier.0.weight"], state["classifier.3.weight"]
    conv6, conv7 = result.state_dict["features.31.weight"], result.state_dict["features.33.weight"]
    assert conv6.shape == (1024, 512, 3, 3) and conv7.shape == (1024, 1024, 1, 1)
    for out, channel, y, x in ((0, 0, 0, 0), (1023, 511, 2, 2), (17, 300, 1, 2)):
        assert conv6[out, channel, y, x] == fc6[4 * out, channel * 49 + 3 * y * 7 + 3 * x]
    assert conv7[5, 1000, 0, 0] == fc7[20, 4000]
    assert result.state_dict["features.31.bias"][9] == state["classifier.0.bias"][36]
    assert result.state_dict["features.33.bias"][9] == state["classifier.3.bias"][36]


def test_vgg16_prefix_and_variants(vgg16):
    state = vgg16.state_dict()
    assert "backbone.features.28.bias" in convert_torchvision(state).state_dict
    as_caffe = convert_torchvision(state, vgg_variant="features").state_dict
    assert torch.equal(as_caffe["backbone.features.0.weight"], state["features.0.weight"])
    assert "backbone.features.31.weight" not in as_caffe
    bare = {k: v for k, v in state.items() if k.startswith("features")}
    assert convert_torchvision(bare).source == "torchvision VGG16 (features)"
    with pytest.raises(ValueError, match="'v1' of VGG16 needs the classifier"):
        convert_torchvision(bare, vgg_variant="v1")
    with pytest.raises(ValueError, match="must be one of .*'auto', 'features', 'v1'"):
        convert_torchvision(state, vgg_variant="caffe")
    with pytest.raises(ValueError, match="Not a torchvision ResNet"):
        convert_torchvision(torchvision.models.vgg11(weights=None, num_classes=2).state_dict())


def test_prefix_and_frozen_norm():
    state = torchvision.models.resnet18(weights=None).state_dict()
    model = build_model(detector_cfg("RetinaNet"))
    result = fill_from_model(convert_torchvision(state), model.state_dict())
    comparison = compare_with_model(result, model.state_dict())
    assert comparison.fits and not result.filled
    assert all(not key.startswith("backbone.bottom_up.") for key in comparison.initial)
    assert "head.cls_score.weight" in comparison.initial
    # With BN the counters exist, and start from 0.
    model = build_model(detector_cfg("RetinaNet", norm="BN"))
    result = fill_from_model(convert_torchvision(state), model.state_dict())
    assert compare_with_model(result, model.state_dict()).fits
    assert all(key.endswith("num_batches_tracked") for key in result.filled) and result.filled


def test_unknown_keys_are_listed():
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer1.0.attention.weight"] = torch.zeros(1)
    result = convert_torchvision(state)
    assert result.unused == ("layer1.0.attention.weight",)
    assert "unused   layer1.0.attention.weight" in result.report()
    with pytest.raises(ValueError, match="Not a torchvision"):
        convert_torchvision({"stem.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="Not a torchvision"):
        convert_torchvision(torchvision.models.vgg11(weights=None).state_dict())
    with pytest.raises(ValueError, match="only a ResNet has a last stage"):
        convert_torchvision({"features.18.0.weight": torch.zeros(1)}, res5="roi_heads.res5.")


def test_a_missing_key_and_a_wrong_shape_are_found():
    model = build_model(detector_cfg("RetinaNet")).state_dict()
    state = torchvision.models.resnet18(weights=None).state_dict()
    del state["layer2.0.conv1.weight"]
    comparison = compare_with_model(convert_torchvision(state), model)
    assert comparison.missing == ("backbone.bottom_up.res3.0.conv1.weight",)
    wider = torchvision.models.resnet34(weights=None).state_dict()
    comparison = compare_with_model(convert_torchvision(wider), model)
    assert not comparison.fits and comparison.unexpected
    wide = torchvision.models.wide_resnet50_2(weights=None).state_dict()
    assert compare_with_model(convert_torchvision(wide), model).mismatched


@pytest.mark.parametrize("res5", ["", "roi_heads.res5."])
def test_bare_resnet_of_detectron2(res5):
    cfg = detector_cfg("RetinaNet")
    torch.manual_seed(0)
    source = build_resnet_backbone(cfg, ShapeSpec(channels=3)).state_dict()
    classifier = {"linear.weight": torch.zeros(2, 512), "linear.bias": torch.zeros(2)}
    result = convert_detectron2({**source, **classifier}, res5=res5)
    assert result.source == "Detectron2 ResNet" and not result.unused
    assert set(result.dropped) == set(classifier)
    stages = {key.split(".")[0] for key in source}
    assert stages == {"stem", "res2", "res3", "res4", "res5"}
    for key, value in source.items():
        last = res5 if key.startswith("res5.") and res5 else ""
        target = last + key[len("res5.") :] if last else "backbone.bottom_up." + key
        assert torch.equal(result.state_dict[target], value)
    assert len(result.state_dict) == len(source)
    if not res5:
        model = build_model(cfg).state_dict()
        assert compare_with_model(result, model).fits
        bare = convert_detectron2(source, prefix="")
        assert list(bare.state_dict) == list(source)


def test_what_is_no_bare_resnet_of_detectron2():
    source = build_resnet_backbone(detector_cfg("RetinaNet"), ShapeSpec(channels=3)).state_dict()
    extra = convert_detectron2({**source, "res2.9.conv1.weight": torch.zeros(1)})
    model = build_model(detector_cfg("RetinaNet")).state_dict()
    assert compare_with_model(extra, model).unexpected == (
        "backbone.bottom_up.res2.9.conv1.weight",
    )
    assert convert_detectron2({**source, "head.weight": torch.zeros(1)}).unused == ("head.weight",)
    with pytest.raises(ValueError, match="Not a bare ResNet of Detectron2"):
        convert_detectron2({f"backbone.{key}": value for key, value in source.items()})


# mmdetection


def to_mmdetection(state, kind, old_names=False):
    """The inverse mapping, written independently of the rules under test."""
    inverse = [RETINANET_ANCHOR_ORDER.index(i) for i in range(9)]
    prefix = {"RetinaNet": "retina", "GFL": "gfl", "ATSS": "atss"}.get(
        kind, "fcos" if old_names else "conv"
    )
    norm = any(k.startswith("head.cls_subnet.1.") for k in state)
    result = {}
    for key, value in state.items():
        parts = key.split(".")
        if key.startswith("backbone.bottom_up.stem.conv1.norm"):
            new = "backbone.bn1." + parts[-1]
        elif key.startswith("backbone.bottom_up.stem.conv1"):
            new = "backbone.conv1." + parts[-1]
        elif key.startswith("backbone.bottom_up.res"):
            stage, block, layer = parts[2], parts[3], parts[4]
            if layer == "shortcut":
                layer = "downsample.1" if "norm" in parts else "downsample.0"
            elif "norm" in parts:
                layer = layer.replace("conv", "bn")
            new = f"backbone.layer{int(stage[3:]) - 1}.{block}.{layer}.{parts[-1]}"
        elif "fpn_lateral" in key:
            new = f"neck.lateral_convs.{int(parts[1][-1]) - 3}.conv.{parts[-1]}"
        elif "fpn_output" in key:
            new = f"neck.fpn_convs.{int(parts[1][-1]) - 3}.conv.{parts[-1]}"
        elif "top_block" in key:
            new = f"neck.fpn_convs.{int(parts[2][-1]) - 3}.conv.{parts[-1]}"
        elif "subnet" in key:
            tower = "cls" if "cls" in parts[1] else "reg"
            index = int(parts[2])
            stage, part = divmod(index, 3) if norm else (index // 2, 0)
            new = f"bbox_head.{tower}_convs.{stage}.{('conv', 'gn')[part]}.{parts[-1]}"
        elif "scales" in key:
            new = f"bbox_head.scales.{parts[2]}.scale"
        else:
            branch = {"cls_score": "cls", "bbox_pred": "reg", "ctrness": "centerness"}[parts[1]]
            new = f"bbox_head.{prefix}_{branch}.{parts[-1]}"
            if kind == "RetinaNet":
                value = permute_anchors(value, inverse)
        assert new not in result
        result[new] = value
    if kind == "GFL":
        result["bbox_head.integral.project"] = torch.linspace(0, 16, 17)
    return result


def swin_to_mmdetection(state):
    """The same for a Swin Transformer; merging layers in the order of an unfold."""
    result = {}
    for key, value in state.items():
        new = key.replace("layers.", "stages.").replace(
            "patch_embed.proj", "patch_embed.projection"
        )
        new = new.replace("attn.", "attn.w_msa.")
        new = new.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        if "downsample" in key:
            # unfold order of an input of C channels: c * 4 + (2 * row + column)
            channels = value.shape[-1] // 4
            index = []
            for c in range(channels):
                for row in range(2):
                    for column in range(2):
                        index.append((row + 2 * column) * channels + c)
            value = value[..., index]
        result["backbone." + new] = value
    return result


@pytest.mark.parametrize("kind", ["RetinaNet", "GFL", "ATSS", "FCOS"])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_names_come_back(kind, norm):
    torch.manual_seed(0)
    model = build_model(detector_cfg(kind, norm))
    state = randomised(model).state_dict()
    source = to_mmdetection(state, kind)
    result = convert_mmdetection(source)
    assert result.source == f"mmdetection {kind} with ResNet" and not result.unused
    assert set(result.used) | set(result.dropped) == set(source)
    result = fill_from_model(result, state)
    assert compare_with_model(result, state).fits
    assert set(result.state_dict) == set(state)
    for key, value in state.items():
        assert torch.equal(result.state_dict[key], value), key
    model.load_state_dict(result.state_dict)


def test_old_predictor_names_of_fcos():
    state = randomised(build_model(detector_cfg("FCOS"))).state_dict()
    new, old = (convert_mmdetection(to_mmdetection(state, "FCOS", o)) for o in (False, True))
    assert "bbox_head.fcos_centerness.bias" in old.used
    assert "bbox_head.conv_centerness.bias" in new.used
    assert all(torch.equal(old.state_dict[k], v) for k, v in new.state_dict.items())


def test_biases_that_the_source_lacks_become_zero():
    cfg = detector_cfg("FCOS")
    cfg.MODEL.FCOS.CONV_BIAS = True
    with_bias = randomised(build_model(cfg)).state_dict()
    without = randomised(build_model(detector_cfg("FCOS"))).state_dict()
    result = convert_mmdetection(to_mmdetection(without, "FCOS"))
    assert not compare_with_model(result, with_bias).fits
    result = fill_from_model(result, with_bias)
    assert compare_with_model(result, with_bias).fits
    assert len(result.filled) == 8 and "head.cls_subnet.0.bias" in result.filled
    assert all((result.state_dict[key] == 0).all() for key in result.filled)
    # The bias of a norm is never made up.
    broken = {k: v for k, v in to_mmdetection(without, "FCOS").items() if "convs.0.gn.b" not in k}
    result = fill_from_model(convert_mmdetection(broken), with_bias)
    assert compare_with_model(result, with_bias).missing == (
        "head.cls_subnet.1.bias",
        "head.bbox_subnet.1.bias",
    )


def mmdetection_anchors(stride):
    """Centred on 0, ratios (h / w) in the outer, scales in the inner loop."""
    boxes = []
    for ratio in (0.5, 1.0, 2.0):
        for scale in range(3):
            base = 4 * stride * 2 ** (scale / 3)
            w, h = base / math.sqrt(ratio), base * math.sqrt(ratio)
            boxes.append([-w / 2, -h / 2, w / 2, h / 2])
    return torch.tensor(boxes)


def test_permuted_retinanet_predicts_the_same_boxes():
    cfg = detector_cfg("RetinaNet")
    generator = DefaultAnchorGenerator(
        sizes=cfg.MODEL.ANCHOR_GENERATOR.SIZES,
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    )
    anchors = next(iter(generator.cell_anchors))
    theirs = mmdetection_anchors(8)
    torch.testing.assert_close(anchors, theirs[list(RETINANET_ANCHOR_ORDER)])
    # One cell: their predictor and anchors, ours converted; boxes as sets with their scores.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(36, 5, generator=generator) * 0.2
    scores = torch.randn(9 * 4, 5, generator=generator)
    feature = torch.randn(5, generator=generator)
    codec = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    expected = codec.apply_deltas((weight @ feature).reshape(9, 4), theirs)
    actual = codec.apply_deltas((permute_anchors(weight) @ feature).reshape(9, 4), anchors)
    order = list(RETINANET_ANCHOR_ORDER)
    torch.testing.assert_close(actual, expected[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        (permute_anchors(scores) @ feature).reshape(9, 4), (scores @ feature).reshape(9, 4)[order]
    )
    # Not the identity: without the permutation the boxes differ.
    wrong = codec.apply_deltas((weight @ feature).reshape(9, 4), anchors)
    assert not torch.allclose(wrong, expected[order], atol=1.0)


def test_mmdetection_swin():
    """Names, and the input order of patch merging against an unfold."""
    small = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4), window_size=4)
    torch.manual_seed(0)
    ours = Swin(**small).eval()
    state = ours.state_dict()
    source = to_mmdetection(build_model(detector_cfg("RetinaNet")).state_dict(), "RetinaNet")
    source = {k: v for k, v in source.items() if not k.startswith("backbone.")}
    source.update(swin_to_mmdetection(state))
    result = convert_mmdetection(source)
    assert result.source == "mmdetection RetinaNet with Swin Transformer" and not result.unused
    for key, value in state.items():
        assert torch.equal(result.state_dict["backbone.bottom_up." + key], value), key

    # Independent check of that order: merging by unfold with their weight is merging with ours.
    merge = ours.layers[0].downsample
    x = torch.randn(1, 12, 6, 8)
    their_norm, their_weight = (
        source[f"backbone.stages.0.downsample.{name}.weight"] for name in ("norm", "reduction")
    )
    their_bias = source["backbone.stages.0.downsample.norm.bias"]
    with torch.no_grad():
        columns = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
        columns = nn.functional.layer_norm(columns, (48,), their_norm, their_bias)
        expected = columns @ their_weight.t()
        actual = merge(x.flatten(2).transpose(1, 2), 6, 8)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


CONFIGS = Path(__file__).parents[2] / "configs"
# widths and depths do not change the names
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "64", "MODEL.RESNETS.DEPTH", "50"),
    *("MODEL.SWIN.EMBED_DIM", "12", "MODEL.SWIN.NUM_HEADS", "(1, 2, 3, 4)"),
]


@pytest.mark.parametrize(
    "name, old_names",
    [
        ("teachers/retinanet_r50_1x", False),
        ("teachers/retinanet_swin_t_1x", False),
        ("teachers/gfl_r50_1x", False),
        ("teachers/atss_r101_1x", False),
        ("teachers/fcos_r101_caffe_ms2x", False),
        ("teachers/fcos_r101_caffe_ms2x", True),
    ],
)
def test_teachers_of_the_recipes(name, old_names):
    """mmdetection's names of these networks give every key of the shipped configs' models."""
    cfg = build_config(str(CONFIGS / f"{name}.yaml"), SMALL)
    model = build_model(cfg)
    state = randomised(model).state_dict()
    bottom_up = "backbone.bottom_up."
    own = {k[len(bottom_up) :]: v for k, v in state.items() if k.startswith(bottom_up)}
    rest = {k: v for k, v in state.items() if not k.startswith(bottom_up)}
    if any(key.startswith("patch_embed.") for key in own):
        source = swin_to_mmdetection(own)
    else:
        source, rest = {}, state
    source.update(to_mmdetection(rest, cfg.MODEL.META_ARCHITECTURE, old_names))
    source = {"state_dict": source, "meta": {"epoch": 12}}
    result = fill_from_model(convert_mmdetection(unwrap_state_dict(source)), state)
    assert not result.unused and not result.filled
    assert compare_with_model(result, state).fits
    for key, value in state.items():
        assert torch.equal(result.state_dict[key], value), key


def test_foreign_detectors_are_refused():
    state = to_mmdetection(build_model(detector_cfg("GFL")).state_dict(), "GFL")
    with pytest.raises(ValueError, match="RetinaNet, FCOS, GFL or ATSS"):
        convert_mmdetection({k: v for k, v in state.items() if "gfl_cls" not in k})
    with pytest.raises(ValueError, match="backbone is neither"):
        convert_mmdetection({k: v for k, v in state.items() if not k.startswith("backbone")})
    retina = to_mmdetection(build_model(detector_cfg("RetinaNet")).state_dict(), "RetinaNet")
    retina["bbox_head.retina_reg.weight"] = torch.zeros(4, 32, 3, 3)
    with pytest.raises(ValueError, match="4 channels"):
        convert_mmdetection(retina)
    with pytest.raises(ValueError, match="would become"):
        convert_mmdetection({**state, "bbox_head.fcos_reg.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="9 anchors"):
        permute_anchors(torch.zeros(10, 3))


def test_unwrap():
    state = {"a.weight": torch.zeros(2)}
    assert unwrap_state_dict(state) == state
    assert unwrap_state_dict({"meta": {"epoch": 1}, "state_dict": state}) == state
    assert unwrap_state_dict({"model": {"module.a.weight": state["a.weight"]}}).keys() == {
        "a.weight"
    }
    for wrong in ({}, {"epoch": 3}, {"state_dict": {"a": 1}}):
        with pytest.raises(ValueError, match="state dict"):
            unwrap_state_dict(wrong)
