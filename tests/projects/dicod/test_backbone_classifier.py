"""Backbones as classifiers: they are Detectron2's networks, learn, and start a detector."""

import importlib.util
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import default_argument_parser
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from kd_d2.projects.dicod.backbone_classifier import BackboneClassifier, build_classifier
from kd_d2.projects.dicod.classifier import CropClassifier
from kd_d2.projects.dicod.image_classifier import load_start_weights
from kd_d2.projects.dicod.teacher import load_classifier
from tests.engine import support
from tests.fixtures import tiny_cfg
from tests.projects.dicod.crop_cases import MEAN, NARROW, STD, class_folder, folder_cfg

ROOT = Path(__file__).parents[3]
CLASSES = ["blue", "green", "red"]


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return class_folder(tmp_path_factory.mktemp("images"), num_images=6)


def quarter_cfg(folder, tmp_path, **changes):
    """ResNet-50 of quarter width."""
    quarter = {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    }
    return folder_cfg(folder, tmp_path, **{**quarter, **changes})


def test_quarter_resnet_has_the_parameters_of_the_specification(folder, tmp_path):
    classes = [f"class {i}" for i in range(1000)]
    model = build_classifier(quarter_cfg(folder, tmp_path), classes)
    assert isinstance(model, BackboneClassifier)
    assert sum(p.numel() for p in model.parameters()) == 1_993_976
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(p.numel() for conv in convs for p in [conv.weight]) == 1_467_696
    assert [stage[-1].out_channels for stage in model.stages] == [64, 128, 256, 512]
    assert model.linear.out_features == 1000 and model.num_classes == 1000
    # a quarter of the channels of torchvision's in every layer
    state = {key: value.shape for key, value in model.state_dict().items() if "conv" in key}
    whole = build_classifier(
        quarter_cfg(
            folder,
            tmp_path,
            **{
                "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
                "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
                "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
            },
        ),
        classes,
    )
    assert state
    for key, value in whole.state_dict().items():
        if key in state and key.endswith("weight"):
            assert value.shape[0] == 4 * state[key][0], key


def test_logits_are_those_of_detectron2(folder, tmp_path):
    torch.manual_seed(0)
    cfg = folder_cfg(folder, tmp_path)
    model = build_classifier(cfg, CLASSES).eval()
    model.linear.weight.data.normal_()
    detector = build_model(detector_cfg())
    bare = {k: v for k, v in model.state_dict().items() if "linear" not in k}
    missing, _ = detector.backbone.bottom_up.load_state_dict(bare, strict=False)
    assert not missing
    crops = torch.rand(2, 3, 64, 64) * 255
    normalised = (crops - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        features = detector.eval().backbone.bottom_up(normalised)["res5"].mean(dim=(2, 3))
        expected = features @ model.linear.weight.T + model.linear.bias
        torch.testing.assert_close(model({"crops": crops}), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 1e-3


def detector_cfg(**changes):
    own = {"INPUT.FORMAT": "RGB", "MODEL.PIXEL_MEAN": MEAN, **NARROW}
    return tiny_cfg("RetinaNet", **{**own, **changes})


def test_it_is_trained_as_a_whole_whatever_the_detector_freezes(folder, tmp_path):
    changes = {"MODEL.BACKBONE.FREEZE_AT": 2, "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4"]}
    model = build_classifier(folder_cfg(folder, tmp_path, **changes), CLASSES).train()
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
    with EventStorage() as storage:
        losses = model(
            {"crops": torch.rand(4, 3, 64, 64) * 255, "labels": torch.tensor([0, 1] * 2)}
        )
        assert "classifier/top1" in storage.latest()
    # the last layer begins near 0, so all classes are equally likely
    assert losses["loss_cross_entropy"].item() == pytest.approx(1.0986, abs=0.4)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.stem.conv1.norm.running_mean.abs().sum() > 0
    assert model.metadata()["arch"] == "backbone" and model.metadata()["classes"] == CLASSES


def test_the_other_architectures_are_torchvisions(folder, tmp_path):
    cfg = folder_cfg(folder, tmp_path, **{"CROP_CLASSIFIER.ARCH": "resnet18"})
    assert isinstance(build_classifier(cfg, CLASSES), CropClassifier)
    cfg = folder_cfg(folder, tmp_path, **{"CROP_CLASSIFIER.ARCH": "vgg16"})
    with pytest.raises(ValueError, match="ARCH must be one of .'backbone', 'resnet18'.*'vgg16'"):
        build_classifier(cfg, CLASSES)


def test_frozen_statistics_are_refused(folder, tmp_path):
    cfg = folder_cfg(folder, tmp_path, **{"MODEL.RESNETS.NORM": "FrozenBN"})
    with pytest.raises(ValueError, match="RESNETS.NORM is 'FrozenBN'.* trained with BN"):
        build_classifier(cfg, CLASSES)


def test_focal_loss_gives_the_logits_their_level(folder, tmp_path):
    changes = {"CROP_CLASSIFIER.LOSSES": ("focal",), "CROP_CLASSIFIER.PRIOR_PROB": 0.1}
    model = build_classifier(folder_cfg(folder, tmp_path, **changes), CLASSES)
    torch.testing.assert_close(model.linear.bias.sigmoid(), torch.full((3,), 0.1))


def test_weights_to_start_from(folder, tmp_path):
    cfg = folder_cfg(folder, tmp_path)
    source, rgb = build_classifier(cfg, CLASSES), build_classifier(cfg, CLASSES[:2])
    bgr = build_classifier(folder_cfg(folder, tmp_path, **{"INPUT.FORMAT": "BGR"}), CLASSES)
    torch.save({"model": source.state_dict()}, tmp_path / "start.pth")
    assert load_start_weights(rgb, str(tmp_path / "start.pth")) == ["linear.bias", "linear.weight"]
    assert torch.equal(rgb.res5[1].conv2.weight, source.res5[1].conv2.weight)
    load_start_weights(bgr, str(tmp_path / "start.pth"))
    assert torch.equal(bgr.stem.conv1.weight, source.stem.conv1.weight.flip(1))


# ---------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """18 images of three colours, 5 a batch, 20 epochs."""
    output = tmp_path_factory.mktemp("run")
    module = script(ROOT / "projects/DICOD/train_classifier.py")
    changes = {
        "CROP_CLASSIFIER.EPOCHS": 20,
        "CROP_CLASSIFIER.DROP_EPOCHS": (12,),
        "CROP_CLASSIFIER.BASE_LR": 0.02,
        "CROP_CLASSIFIER.OPTIMIZER": "sgd",
        "CROP_CLASSIFIER.INPUT_SIZE": 64,
        "CROP_CLASSIFIER.BATCH_SIZE": 5,
        "CROP_CLASSIFIER.CHECKPOINT_EPOCHS": 0,
        "CROP_CLASSIFIER.EVAL_EPOCHS": 20,
    }
    cfg = folder_cfg(folder, output, **changes)
    return support.train(cfg, module.ClassifierTrainer), output / "output" / "model_final.pth"


def test_it_learns_the_classes_of_a_folder(trained, folder):
    trainer, file = trained
    assert trainer.max_iter == 80  # 18 images are 4 batches of 5
    results = trainer._last_eval_results[str(folder / "val")]
    assert results == {"top1": 100.0, "top5": 100.0, "crops": 21.0}
    facts = torch.load(file, weights_only=True)["run_info"]
    assert facts["arch"] == "backbone" and facts["classes"] == CLASSES
    with pytest.raises(ValueError, match="detector's backbone .* --source detectron2"):
        load_classifier(str(file))


def test_a_detector_starts_from_it(trained, tmp_path):
    """By tools/convert_weights.py strictly, and by Detectron2's matching of names."""
    trainer, file = trained
    (tmp_path / "detector.yaml").write_text(detector_yaml(tmp_path))
    target = tmp_path / "backbone.pth"
    convert = script(ROOT / "tools/convert_weights.py")
    command = ["--source", "detectron2", "--input", str(file), "--output", str(target)]
    assert convert.main([*command, "--config-file", str(tmp_path / "detector.yaml")]) == 0
    checkpoint = torch.load(target, weights_only=True)["model"]
    assert not any("linear" in key for key in checkpoint)
    source = trainer.student.state_dict()
    for path in (str(target), f"{file}?matching_heuristics=True"):
        model = build_model(detector_cfg())
        DetectionCheckpointer(model).load(path)
        state = model.backbone.bottom_up.state_dict()
        assert set(source) - set(state) == {"linear.weight", "linear.bias"} | {
            key for key in source if key.endswith("num_batches_tracked")
        }
        for key, value in state.items():
            assert torch.equal(value, source[key]), key
    # of another width: refused, nothing is written
    target.unlink()
    wide = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "12"]
    assert convert.main([*command, "--config-file", str(tmp_path / "detector.yaml"), *wide]) == 1
    assert not target.exists()


def detector_yaml(folder):
    return support.write_yaml(folder / "d.yaml", detector_cfg()) and (folder / "d.yaml").read_text()


def eval_args(folder, tmp_path, weights, *more):
    cfg = folder_cfg(folder, tmp_path)
    options = {
        "MODEL.WEIGHTS": str(weights),
        "MODEL.DEVICE": "cpu",
        "DATALOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": str(tmp_path / "eval"),
        "MODEL.PIXEL_MEAN": MEAN,
        "MODEL.PIXEL_STD": STD,
        "INPUT.FORMAT": "RGB",
        "MODEL.RESNETS.NORM": "BN",
        **NARROW,
        "CROP_CLASSIFIER.MODE": "folder",
        "CROP_CLASSIFIER.ARCH": "backbone",
        "CROP_CLASSIFIER.INPUT_SIZE": 64,
        "CROP_CLASSIFIER.FOLDER.TRAIN": cfg.CROP_CLASSIFIER.FOLDER.TRAIN,
        "CROP_CLASSIFIER.FOLDER.TEST": cfg.CROP_CLASSIFIER.FOLDER.TEST,
    }
    words = [str(part) for item in options.items() for part in item]
    return default_argument_parser().parse_args(["--eval-only", *words, *more])


def test_evaluation_alone(trained, folder, tmp_path):
    trainer, file = trained
    module = script(ROOT / "projects/DICOD/train_classifier.py")
    results = module.prepare(eval_args(folder, tmp_path, file))()
    assert results == trainer._last_eval_results
    with pytest.raises(ValueError, match="a classifier with arch backbone, .* resnet18"):
        module.prepare(eval_args(folder, tmp_path, file, "CROP_CLASSIFIER.ARCH", "resnet18"))
    narrow = ("MODEL.RESNETS.STEM_OUT_CHANNELS", "12")
    with pytest.raises(ValueError, match="is no backbone:[^$]*stem.conv1"):
        module.prepare(eval_args(folder, tmp_path, file, *narrow))
    other = class_folder(tmp_path, num_images=1, classes=("blue", "green", "violet"))
    changed = ("CROP_CLASSIFIER.FOLDER.TEST", str(other / "val"))
    with pytest.raises(ValueError, match="3 classes, the classifier 3; .*'violet', 'red'"):
        module.prepare(eval_args(folder, tmp_path, file, *changed))


def test_a_backbone_resumes_exactly(folder, tmp_path):
    module = script(ROOT / "projects/DICOD/train_classifier.py")
    changes = {"CROP_CLASSIFIER.EPOCHS": 2, "CROP_CLASSIFIER.EVAL_EPOCHS": 0}

    def run(output, stop_at=None, resume=False):
        output = str(tmp_path / output)
        cfg = folder_cfg(folder, tmp_path, **{**changes, "OUTPUT_DIR": output})
        hooks = [support.StopAt(stop_at)] if stop_at else []
        return support.train(cfg, module.ClassifierTrainer, resume, hooks)

    whole = run("whole")
    run("parts", stop_at=4)
    resumed = run("parts", resume=True)
    assert resumed.curve == {i: whole.curve[i] for i in (3, 4, 5)}
    assert whole.curve[3]["total_loss"] != whole.curve[0]["total_loss"]
