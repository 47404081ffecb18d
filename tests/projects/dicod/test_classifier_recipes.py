"""The recipes of classifiers say what Table S1 and the paper's section on teachers say."""

import re

import pytest

from kd_d2.projects.dicod.backbone_classifier import build_classifier
from tests.projects.dicod.recipes import CONFIGS, MEAN, README, STD, check_published, config

# published top-1
CLASSIFIERS = {
    **{f"ssd_r50_{s}": a for s, a in ((56, 76.26), (112, 80.30), (224, 80.41))},
    **{f"general_r50_{s}_cel": a for s, a in ((56, 76.92), (112, 80.81), (224, 81.42))},
    **{f"general_r50_{s}_fl": a for s, a in ((56, 72.86), (112, 77.50), (224, 77.04))},
    **{f"general_r50_{s}_joint": a for s, a in ((56, 77.01), (112, 81.02), (224, 81.67))},
    **{"ssd_r18_112": 75.78, "ssd_rx101_112": 83.35},
}


def test_every_recipe_is_a_row():
    found = {path.stem for path in (CONFIGS / "COCO/classifiers").glob("*.yaml")}
    assert found == set(CLASSIFIERS)


@pytest.mark.parametrize("row", CLASSIFIERS)
def test_published_results(row):
    check_published(f"COCO/classifiers/{row}", f"{CLASSIFIERS[row]:.2f}")


@pytest.mark.parametrize("row", CLASSIFIERS)
def test_classifier(row):
    """Specification of DICOD, section 2."""
    kind, arch, size, *losses = row.split("_")
    cfg = config(f"COCO/classifiers/{row}")
    node = cfg.CROP_CLASSIFIER
    full = {"r50": "resnet50", "r18": "resnet18", "rx101": "resnext101_32x8d"}[arch]
    names = {"cel": ("cross_entropy",), "fl": ("focal",), "joint": ("cross_entropy", "focal")}
    assert (node.ARCH, node.INPUT_SIZE) == (full, int(size))
    assert tuple(node.LOSSES) == names[losses[0] if losses else "cel"]
    assert (node.EPOCHS, node.BASE_LR, tuple(node.DROP_EPOCHS), node.DROP_FACTOR) == (
        *(90, 1e-4),
        *((50,), 0.1),
    )
    assert (node.OPTIMIZER, node.WEIGHT_DECAY, node.BATCH_SIZE) == ("adam", 1e-4, 256)
    assert node.MODE == "object" and node.PHOTOMETRIC == (kind == "ssd")
    assert list(cfg.MODEL.PIXEL_STD) == ([1.0] * 3 if kind == "ssd" else STD)
    assert re.fullmatch(rf"weights/{full}-[0-9a-f]{{8}}\.pth", node.WEIGHTS)
    assert node.WEIGHTS in README


def test_quarter_width_on_imagenet():
    """Specification of DICOD, section 8; the settings are PyTorch's ImageNet example's."""
    cfg = config("ImageNet/resnet50_quarter")
    model = build_classifier(cfg, [str(i) for i in range(1000)])
    assert sum(p.numel() for p in model.parameters()) == 1_993_976
    node = cfg.CROP_CLASSIFIER
    assert (node.MODE, node.ARCH, node.INPUT_SIZE) == ("folder", "backbone", 224)
    assert (node.FOLDER.TRAIN, node.FOLDER.TEST) == ("imagenet/train", "imagenet/val")
    assert (node.OPTIMIZER, node.BASE_LR, node.MOMENTUM) == ("sgd", 0.1, 0.9)
    assert (node.EPOCHS, tuple(node.DROP_EPOCHS), node.DROP_FACTOR) == (90, (30, 60), 0.1)
    assert (node.BATCH_SIZE, node.WEIGHT_DECAY, node.WEIGHTS) == (256, 1e-4, "")
    assert tuple(node.LOSSES) == ("cross_entropy",) and not cfg.DATASETS.TRAIN
    assert list(cfg.MODEL.PIXEL_MEAN) == MEAN and list(cfg.MODEL.PIXEL_STD) == STD
    assert cfg.INPUT.FORMAT == "RGB" and cfg.INPUT.RANDOM_FLIP == "horizontal"
