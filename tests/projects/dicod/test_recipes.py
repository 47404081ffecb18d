"""The recipes say what the rows of the paper's tables say, and every student can train."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from kd_d2.engine import KDTrainer
from kd_d2.engine.main import build_config
from kd_d2.engine.optimizer import build_optimizer
from kd_d2.projects.dicod.backbone_classifier import build_classifier
from tests.fixtures import tiny_batch
from tests.projects.dicod.recipes import (
    CONFIGS,
    MEAN,
    PROJECT,
    README,
    STD,
    check_published,
    config,
)

COCO = CONFIGS / "COCO"

# what is on: (weight and temperature of KDcls, weight of the pixels, weight of the features)
TERMS = {
    "plain": None,
    "kdcls": ((0.4, 2.0), None, None),
    "loc": (None, 0.15, None),
    "loc_kdloc": (None, 0.15, 0.15),
    "all": ((0.4, 2.0), 0.15, 0.15),
}
# published AP of plain, kdcls, loc, loc_kdloc, all; Table 1 and Table S2
STUDENTS = {
    "ssd300": (25.6, 26.3, 27.1, 27.2, 27.9),
    "ssd512": (29.4, 30.3, 30.8, 31.0, 32.1),
    "faster_rcnn_qr50_1x": (23.3, 25.9, 24.2, 24.3, 27.2),
    "faster_rcnn_qr50_2x": (23.6, None, None, None, 27.7),
    "faster_rcnn_qr50_4x": (24.5, None, None, None, 28.4),
    "faster_rcnn_mv2_1x": (31.9, 32.6, 32.2, 32.3, 32.7),
    "faster_rcnn_r50_2x": (38.4, None, None, None, 38.8),
    "retinanet_r50_2x": (37.4, None, None, None, 37.9),
}
# not in the paper
COMPACT = ("retinanet_qr50_1x", "retinanet_mv2_1x")
# ablations of SSD300: terms, other values by key, classifier, published AP
KDCLS, LOC = TERMS["kdcls"], TERMS["loc"]
ABLATIONS = {
    **{
        f"ssd300_kdcls_w{w}_t{t}": (((w, float(t)), None, None), {}, "ssd_r50_112", ap)
        for w, t, ap in (
            *((0.1, 1, 25.8), (0.1, 2, 25.4), (0.2, 1, 25.8)),
            *((0.3, 1, 26.0), (0.4, 1, 26.1), (0.4, 3, 26.0)),
        )
    },
    "ssd300_kdcls_r18": (KDCLS, {}, "ssd_r18_112", 25.9),
    "ssd300_kdcls_rx101": (KDCLS, {}, "ssd_rx101_112", 25.3),
    "ssd300_kdcls_r50_56": (KDCLS, {}, "ssd_r50_56", 26.2),
    "ssd300_kdcls_r50_224": (KDCLS, {}, "ssd_r50_224", 26.2),
    **{
        f"ssd300_loc_size{size}": (LOC, {"SAMPLE_SIZE": size}, "ssd_r50_112", ap)
        for size, ap in ((14, 26.4), (28, 26.7), (56, 26.8), (224, 27.0))
    },
    **{
        f"ssd300_loc_pool{pool}": (LOC, {"OBJ_POOL": pool}, "ssd_r50_112", ap)
        for pool, ap in ((2, 26.6), (8, 27.1), (16, 26.9))
    },
    "ssd300_kdloc": ((None, None, 0.15), {}, "ssd_r50_112", 26.8),
    "ssd300_loc_kdloc_layer1": (
        TERMS["loc_kdloc"],
        {"FEAT_LAYERS": ["stem", "layer1"], "FEAT_POOLS": [8, 16]},
        "ssd_r50_112",
        26.9,
    ),
}


def _rows():
    """row: (student, terms, other values, classifier, published AP)."""
    found = {}
    for student, published in STUDENTS.items():
        teacher = "ssd_r50_112" if student.startswith("ssd") else "general_r50_112_joint"
        for (name, terms), ap in zip(TERMS.items(), published):
            if ap is not None:
                found[f"{student}_{name}"] = (student, terms, {}, teacher, ap)
    for student in COMPACT:
        for name in ("plain", "all"):
            row = (student, TERMS[name], {}, "general_r50_112_joint", None)
            found[f"{student}_{name}"] = row
    found.update({row: ("ssd300", *facts) for row, facts in ABLATIONS.items()})
    return found


ROWS = _rows()
LOC_DEFAULTS = {"SAMPLE_SIZE": 112, "OBJ_POOL": 4, "FEAT_LAYERS": ["stem"], "FEAT_POOLS": [8]}
# student: (architecture, backbone, batch, learning rate, weight decay, iterations, drops)
SSD = ("SSD", "VGG", 64, 0.002, 5e-4, 219_888, (146_592, 201_564))
SETTINGS = {
    "ssd300": SSD,
    "ssd512": SSD,
    "faster_rcnn_mv2_1x": ("RCNN", "MV2", 16, 0.02, 1e-4, 87_960, (58_640, 80_630)),
    "faster_rcnn_qr50_1x": ("RCNN", "QR50", 32, 0.04, 1e-4, 43_980, (29_320, 40_315)),
    "faster_rcnn_qr50_2x": ("RCNN", "QR50", 32, 0.04, 1e-4, 87_960, (58_640, 80_630)),
    "faster_rcnn_qr50_4x": ("RCNN", "QR50", 32, 0.04, 1e-4, 175_920, (117_280, 161_260)),
    "faster_rcnn_r50_2x": ("RCNN", "R50", 16, 0.02, 1e-4, 175_920, (117_280, 161_260)),
    "retinanet_r50_2x": ("RetinaNet", "R50", 16, 0.01, 1e-4, 175_920, (117_280, 161_260)),
    "retinanet_qr50_1x": ("RetinaNet", "QR50", 16, 0.01, 1e-4, 87_960, (58_640, 80_630)),
    "retinanet_mv2_1x": ("RetinaNet", "MV2", 16, 0.01, 1e-4, 87_960, (58_640, 80_630)),
}


def _backbone(cfg):
    name, resnet = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS
    if "resnet" not in name:
        return {"build_ssd_vgg_backbone": "VGG"}.get(name) or ("MV2" if "mobile" in name else name)
    widths = (resnet.STEM_OUT_CHANNELS, resnet.WIDTH_PER_GROUP, resnet.RES2_OUT_CHANNELS)
    assert resnet.DEPTH == 50 and not resnet.STRIDE_IN_1X1 and resnet.NORM == "FrozenBN"
    return {(64, 64, 256): "R50", (16, 16, 64): "QR50"}[widths]


# ------------------------------------------------------------------------------------- what is said
def test_every_recipe_is_a_row():
    assert {path.stem for path in COCO.glob("*.yaml")} == set(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_published_results(row):
    ap = ROWS[row][-1]
    comment = check_published(f"COCO/{row}", "" if ap is None else f"{ap:.1f}")
    assert ap or "Not in the paper" in comment or row.endswith("_plain")


@pytest.mark.parametrize("row", ROWS)
def test_row(row):
    student, terms, values, teacher, _ = ROWS[row]
    cfg = config(f"COCO/{row}")
    architecture, backbone, batch, rate, decay, iterations, drops = SETTINGS[student]
    names = {"RCNN": "GeneralizedRCNN"}
    assert cfg.MODEL.META_ARCHITECTURE == names.get(architecture, architecture)
    assert _backbone(cfg) == backbone
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (batch, rate, iterations)
    assert tuple(solver.STEPS) == drops and solver.GAMMA == 0.1
    assert solver.WEIGHT_DECAY == solver.WEIGHT_DECAY_NORM == decay and solver.MOMENTUM == 0.9
    assert (solver.WARMUP_METHOD, solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (
        *("linear", 500),
        0.001,
    )
    assert solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    assert not solver.CLIP_GRADIENTS.ENABLED
    assert cfg.INPUT.FORMAT == "RGB" and list(cfg.MODEL.PIXEL_MEAN) == MEAN
    assert cfg.INPUT.RANDOM_FLIP == "horizontal"
    if architecture == "SSD":
        assert list(cfg.MODEL.PIXEL_STD) == [1.0, 1.0, 1.0]
        assert cfg.MODEL.SSD.INPUT_SIZE == int(student[3:])
    else:
        assert list(cfg.MODEL.PIXEL_STD) == STD
        assert tuple(cfg.INPUT.MIN_SIZE_TRAIN) == (800,) and cfg.INPUT.MAX_SIZE_TRAIN == 1333
    if terms is None:
        assert not cfg.KD.ENABLED
        return
    node = cfg.KD.DICOD
    assert cfg.KD.ENABLED and cfg.KD.DISTILLERS == ("DICOD",)
    found = (
        (node.CLS.WEIGHT, node.CLS.T) if node.CLS.ENABLED else None,
        node.LOC.OBJ_WEIGHT or None if node.LOC.ENABLED else None,
        node.LOC.FEAT_WEIGHT or None if node.LOC.ENABLED else None,
    )
    assert found == terms and node.CLS.MODE == "auto"
    expected = {**LOC_DEFAULTS, **values}
    assert {key: node.LOC[key] for key in expected} == expected
    assert cfg.KD.TEACHER.TYPE == "ClassifierTeacher"
    assert cfg.KD.TEACHER.WEIGHTS == f"output/coco/dicod/classifiers/{teacher}/model_final.pth"


@pytest.mark.parametrize("row", [row for row, facts in ROWS.items() if facts[1]])
def test_the_classifier_is_trained_as_the_student_needs_it(row):
    """Its recipe writes the file; architecture, size, classes and images are the student's."""
    cfg = config(f"COCO/{row}")
    stem = Path(cfg.KD.TEACHER.WEIGHTS).parent.name
    teacher = config(f"COCO/classifiers/{stem}")
    assert cfg.KD.TEACHER.WEIGHTS == f"{teacher.OUTPUT_DIR}/model_final.pth"
    node = teacher.CROP_CLASSIFIER
    for key in ("ARCH", "INPUT_SIZE"):
        assert cfg.KD.TEACHER.CLASSIFIER[key] == node[key]
    assert teacher.DATASETS.TRAIN == cfg.DATASETS.TRAIN
    assert teacher.INPUT.FORMAT == cfg.INPUT.FORMAT
    assert teacher.INPUT.RANDOM_FLIP == cfg.INPUT.RANDOM_FLIP
    assert teacher.MODEL.PIXEL_MEAN == cfg.MODEL.PIXEL_MEAN
    assert teacher.MODEL.PIXEL_STD == cfg.MODEL.PIXEL_STD
    ssd = cfg.MODEL.META_ARCHITECTURE == "SSD"
    assert node.PHOTOMETRIC == ssd
    assert set(node.LOSSES) == ({"cross_entropy"} if ssd else {"cross_entropy", "focal"})


def test_readme_says_how_to_get_every_weight():
    """Each file below weights/ is the output of a command, or is torchvision's."""
    commands = [line for line in README.splitlines() if "convert_weights.py" in line]
    used = {config(f"COCO/{row}").MODEL.WEIGHTS for row in ROWS}
    ours = {weights for weights in used if weights.startswith("weights/")}
    assert len(ours) == 3 and {w for w in used - ours if "detectron2://" not in w} == set()
    for weights in ours:
        (command,) = [line for line in commands if line.endswith(f"--output {weights}")]
        source = re.search(r"--config-file (\S+)", command).group(1)
        assert build_config(str(PROJECT.parents[1] / source)).MODEL.WEIGHTS == weights


# ------------------------------------------------------------------------------- students
def test_quarter_width():
    """Specification of DICOD, section 8; ImageNet weights are those of the very same network."""
    detectors = {
        row: build_model(_small(f"COCO/{row}")).backbone
        for row in ("faster_rcnn_qr50_1x_all", "retinanet_qr50_1x_all")
    }
    imagenet = config("ImageNet/resnet50_quarter")
    classifier = build_classifier(imagenet, [str(i) for i in range(1000)])
    shapes = {k: v.shape for k, v in classifier.state_dict().items() if "linear" not in k}
    shapes = {k: v for k, v in shapes.items() if not k.endswith("num_batches_tracked")}
    for backbone in detectors.values():
        bottom_up = backbone.bottom_up
        assert {k: v.shape for k, v in bottom_up.state_dict().items()} == shapes
        convs = [m for m in bottom_up.modules() if isinstance(m, torch.nn.Conv2d)]
        assert sum(conv.weight.numel() for conv in convs) == 1_467_696
        widths = [stage[-1].out_channels for stage in bottom_up.stages]
        assert widths == [64, 128, 256, 512]
        assert {shape.channels for shape in backbone.output_shape().values()} == {256}
    node = imagenet.CROP_CLASSIFIER
    student = config("COCO/faster_rcnn_qr50_1x_all")
    assert (node.MODE, node.ARCH, node.INPUT_SIZE) == ("folder", "backbone", 224)
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        assert list(imagenet.MODEL[key]) == list(student.MODEL[key])
    # the place of the stride is in no shape
    assert imagenet.MODEL.RESNETS.STRIDE_IN_1X1 == student.MODEL.RESNETS.STRIDE_IN_1X1
    assert imagenet.INPUT.FORMAT == student.INPUT.FORMAT


def test_mobilenet_v2():
    for row, levels in (("faster_rcnn_mv2_1x_all", "23456"), ("retinanet_mv2_1x_all", "34567")):
        backbone = build_model(_small(f"COCO/{row}")).backbone
        assert list(backbone.output_shape()) == [f"p{level}" for level in levels]
        assert backbone.bottom_up.output_shape()["res5"].channels == 1280
        # frozen statistics, nothing else
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in backbone.modules())
        assert all(p.requires_grad for p in backbone.parameters())


# Inputs, default boxes, pyramids and students' backbones stay; VGG and heads become thin.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "KD.TEACHER.WEIGHTS", ""),
    *("KD.TEACHER.ALLOW_UNTRAINED", "True", "KD.TEACHER.CLASSIFIER.ARCH", "resnet18"),
    *("KD.TEACHER.CLASSIFIER.INPUT_SIZE", "32", "KD.DICOD.LOC.SAMPLE_SIZE", "32"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "40"),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
    *("MODEL.RETINANET.NUM_CONVS", "1", "SOLVER.BASE_LR", "1e-6", "SEED", "3"),
    *("MODEL.SSD_VGG.CHANNELS", "(8, 12, 16, 24, 24)", "MODEL.SSD_VGG.CONV7_CHANNELS", "32"),
]


def _small(path):
    return build_config(str(CONFIGS / f"{path}.yaml"), SMALL)


def _sizes(cfg):
    if cfg.MODEL.META_ARCHITECTURE == "SSD":
        return [(cfg.MODEL.SSD.INPUT_SIZE,) * 2]
    # the anchors of a RetinaNet are too large for smaller images to have foreground boxes
    return [(128, 128), (96, 112)] if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else [(64, 96)]


DISTINCT = [f"{student}_all" for student in SETTINGS if "_4x" not in student]
DISTINCT = [row for row in DISTINCT if row != "faster_rcnn_qr50_2x_all"]


@pytest.mark.parametrize("row", DISTINCT)
def test_student_takes_a_step(row):
    """With all terms: everything that is not frozen moves, the classifier does not."""
    cfg = _small(f"COCO/{row}")
    seed_all_rng(1)
    model = KDTrainer.build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    before = {k: v.detach().clone() for k, v in model.student.named_parameters()}
    teacher = {k: v.clone() for k, v in model.teacher.model.state_dict().items()}
    with EventStorage(0):
        losses = model(tiny_batch(num_images=1, sizes=_sizes(cfg), num_gt=3, num_classes=80))
    assert all(torch.isfinite(value) for value in losses.values()), losses
    terms = {name: value.item() for name, value in losses.items() if "loss_kd" in name}
    assert len(terms) == 3 and all(value > 0 for value in terms.values()), terms
    sum(losses.values()).backward()
    optimizer.step()
    moved = {k for k, v in model.student.named_parameters() if not torch.equal(v, before[k])}
    assert any(name.startswith("backbone") for name in moved)
    assert any(not name.startswith("backbone") for name in moved)
    for name, value in model.student.named_parameters():
        assert (value.grad is not None) == value.requires_grad, name
    for name, value in model.teacher.model.state_dict().items():
        assert torch.equal(value, teacher[name]), name


@pytest.mark.parametrize("row", ["ssd300_plain", "faster_rcnn_mv2_1x_plain"])
def test_without_distillation_it_is_the_plain_detector(row):
    model = KDTrainer.build_model(_small(f"COCO/{row}"))
    assert type(model).__module__.startswith(("detectron2.", "kd_d2.modeling."))
