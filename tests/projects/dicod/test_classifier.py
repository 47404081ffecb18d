"""The classifier: torchvision's network, its losses, and the weights it starts from."""

import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.models import resnet18, resnet50, resnext101_32x8d

from kd_d2.projects.dicod.classifier import ARCHITECTURES, STAGES, CropClassifier
from kd_d2.projects.dicod.image_classifier import (
    correct_in_top,
    cross_entropy_loss,
    focal_loss,
    load_start_weights,
)
from tests.projects.dicod.crop_cases import CLASSES, MEAN, STD, classifier_cfg, small_classifier

# specification of DICOD, item 15 of its oracles
LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 2])


def test_losses_have_the_values_of_the_specification():
    assert cross_entropy_loss(LOGITS, LABELS).item() == pytest.approx(0.634229, abs=1e-6)
    assert focal_loss(LOGITS, LABELS).item() == pytest.approx(0.225331, abs=1e-6)
    shifted = LOGITS - 4.595  # the prior 0.01
    assert cross_entropy_loss(shifted, LABELS).item() == pytest.approx(0.634229, abs=1e-6)
    assert focal_loss(shifted, LABELS).item() == pytest.approx(0.852846, abs=1e-6)


def test_focal_loss_equals_its_definition():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 4), torch.randint(0, 4, (5,))
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        for c, z in enumerate(row):
            p = 1 / (1 + math.exp(-z))
            if c == label:
                total += -0.3 * (1 - p) ** 1.5 * math.log(p)
            else:
                total += -0.7 * p**1.5 * math.log(1 - p)
    ours = focal_loss(logits, labels, alpha=0.3, gamma=1.5)
    assert ours.item() == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize("loss", [cross_entropy_loss, focal_loss])
def test_no_crops(loss):
    logits = torch.zeros(0, 3, requires_grad=True)
    value = loss(logits, torch.zeros(0, dtype=torch.long))
    assert value.item() == 0 and value.requires_grad


@pytest.mark.parametrize(
    "losses, weight, expected",
    [
        (("cross_entropy",), 1.0, {"loss_cross_entropy": 0.634229}),
        (("focal",), 1.0, {"loss_focal": 0.225331}),
        (("cross_entropy", "focal"), 1.0, {"loss_cross_entropy": 0.634229, "loss_focal": 0.225331}),
        (("focal", "cross_entropy"), 3.0, {"loss_cross_entropy": 0.634229, "loss_focal": 0.675993}),
    ],
)
def test_training_returns_the_losses_by_name(losses, weight, expected, monkeypatch):
    model = small_classifier(losses=losses, focal_weight=weight)
    monkeypatch.setattr(CropClassifier, "logits", lambda self, crops: LOGITS)
    with EventStorage() as storage:
        found = model({"crops": torch.zeros(2, 3, 32, 32), "labels": LABELS})
        top1 = storage.latest()["classifier/top1"][0]
    assert {k: v.item() for k, v in found.items()} == pytest.approx(expected, abs=1e-5)
    assert top1 == 50.0


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext101_32x8d"])
def test_it_is_torchvisions_network(name):
    builders = {"resnet18": resnet18, "resnet50": resnet50, "resnext101_32x8d": resnext101_32x8d}
    with torch.device("meta"):
        theirs = builders[name](num_classes=3)
        ours = small_classifier(arch=name)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])
    assert "resnet34" in ARCHITECTURES


def test_logits_features_and_normalisation():
    torch.manual_seed(0)
    model = small_classifier().eval()
    theirs = resnet18(num_classes=3).eval()
    theirs.load_state_dict(model.state_dict())
    crops = torch.rand(2, 3, 64, 64) * 255
    normalised = (crops - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(model({"crops": crops}), theirs(normalised))

    features = model.features(normalised, ["layer2", "stem"])
    assert list(features) == ["layer2", "stem"]
    stem = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(normalised))))
    torch.testing.assert_close(features["stem"], stem)
    torch.testing.assert_close(features["layer2"], theirs.layer2(theirs.layer1(stem)))
    sides = {"stem": 16, "layer1": 16, "layer2": 8, "layer3": 4, "layer4": 2}
    found = model.features(normalised, STAGES)
    assert {stage: x.shape[-1] for stage, x in found.items()} == sides
    assert model.features(normalised, []) == {}
    with pytest.raises(ValueError, match="unknown stages .'layer5'."):
        model.features(normalised, ["stem", "layer5"])


def test_nothing_behind_the_deepest_feature_is_computed():
    model = small_classifier().eval()
    ran = []
    for stage in ("layer1", "layer2", "layer3", "fc"):
        getattr(model, stage).register_forward_hook(lambda *_, stage=stage: ran.append(stage))
    model.features(torch.zeros(1, 3, 32, 32), ["layer1", "stem"])
    assert ran == ["layer1"]


def test_bias_gives_the_focal_loss_its_level():
    for losses in (("focal",), ("cross_entropy", "focal")):
        model = small_classifier(losses=losses, prior_prob=0.02)
        torch.testing.assert_close(model.fc.bias.sigmoid(), torch.full((3,), 0.02))
    assert small_classifier().fc.bias.detach().std() > 0


def test_config_and_metadata(tmp_path):
    cfg = classifier_cfg(tmp_path, "unused", **{"CROP_CLASSIFIER.INPUT_SIZE": 56})
    model = CropClassifier(cfg, CLASSES)
    assert model.metadata() == {
        "arch": "resnet18",
        "classes": CLASSES,
        "pixel_mean": MEAN,
        "pixel_std": STD,
        "format": "RGB",
        "input_size": 56,
        "losses": ["cross_entropy", "focal"],
    }
    assert not {"pixel_mean", "pixel_std"} & set(model.state_dict())
    with pytest.raises(ValueError, match="ARCH must be one of .* got 'resnet20'"):
        small_classifier(arch="resnet20")
    with pytest.raises(ValueError, match="LOSSES must be one of .* got 'dice'"):
        small_classifier(losses=("dice",))
    with pytest.raises(ValueError, match="LOSSES is empty"):
        small_classifier(losses=())


@pytest.mark.parametrize("layout", ["torchvision", "imagenet example"])
def test_weights_to_start_from(layout, tmp_path):
    torch.manual_seed(1)
    source = resnet18(num_classes=1000).state_dict()
    file = str(tmp_path / "weights.pth")
    wrapped = {f"module.{key}": value for key, value in source.items()}
    example = {"epoch": 90, "arch": "resnet18", "state_dict": wrapped}
    torch.save(source if layout == "torchvision" else example, file)
    torch.manual_seed(2)
    rgb, bgr = small_classifier(), small_classifier(image_format="BGR")
    fc = rgb.fc.weight.clone()
    assert load_start_weights(rgb, file) == ["fc.bias", "fc.weight"]
    assert torch.equal(rgb.fc.weight, fc)
    for key, value in rgb.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, source[key]), key
    load_start_weights(bgr, file)
    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(bgr.conv1(pixels.flip(1)), rgb.conv1(pixels))


def test_weights_that_do_not_fit_are_listed(tmp_path):
    source = resnet18(num_classes=1000).state_dict()
    del source["layer1.0.conv1.weight"]
    source["layer9.weight"] = torch.zeros(1)
    source["conv1.weight"] = torch.zeros(64, 3, 5, 5)
    torch.save(source, tmp_path / "weights.pth")
    model = small_classifier()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_start_weights(model, str(tmp_path / "weights.pth"))
    for part in ("resnet18", "layer1.0.conv1", "layer9", r"(64, 3, 5, 5) in the checkpoint"):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_top_k():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 2, 0]])
    labels = torch.tensor([0, 2, 0])
    assert [correct_in_top(logits, labels, k).item() for k in (1, 2, 3, 5)] == [1, 2, 3, 3]


def test_statistics_are_trained():
    model = small_classifier()
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with EventStorage():
        model({"crops": torch.rand(2, 3, 32, 32) * 255, "labels": LABELS})
    assert model.bn1.running_mean.abs().sum() > 0
