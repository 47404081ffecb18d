"""Teachers: what they see, what they are built from, and what stops the run before it starts."""

import hashlib
import logging

import pytest
import torch
from detectron2.data import MetadataCatalog
from torch import nn

from kd_d2.distillation import TEACHER_REGISTRY, DetectorTeacher, Teacher, build_teacher, freeze
from tests.fixtures import CLASSES, save_weights, teacher_of, tiny_batch, tiny_cfg, tiny_model

MEAN, STD = [10.0, 100.0, 200.0], [2.0, 50.0, 7.0]
OWN_STATISTICS = {"MODEL.PIXEL_MEAN": MEAN, "MODEL.PIXEL_STD": STD}


def _batch():
    return tiny_batch(sizes=[(64, 64), (37, 51)])


# ------------------------------------------------------------------------- what the teacher sees
def test_images_are_normalised_with_the_teachers_own_statistics_and_padded_with_zeros():
    teacher = teacher_of(tiny_model("RetinaNet", **OWN_STATISTICS))
    images = teacher.preprocess(_batch(), (64, 96))
    assert images.shape == (2, 3, 64, 96) and images.dtype == torch.float32
    for image, inputs in zip(images, _batch()):
        height, width = inputs["image"].shape[1:]
        for c in range(3):
            pixels = inputs["image"][c].double()
            expected = ((pixels - MEAN[c]) / STD[c]).float()
            torch.testing.assert_close(image[c, :height, :width], expected)
        assert (image[:, height:] == 0).all() and (image[:, :, width:] == 0).all()


def test_images_equal_those_of_the_models_own_preprocessing():
    model = tiny_model("GFL")
    own = model.preprocess_image(_batch()).tensor
    assert torch.equal(teacher_of(model).preprocess(_batch(), tuple(own.shape[-2:])), own)


def test_images_are_left_as_they_are():
    batch = _batch()
    before = [x["image"].clone() for x in batch]
    teacher = teacher_of(tiny_model("RetinaNet"), input_format="RGB", student_format="BGR")
    teacher.preprocess(batch, (64, 64))
    assert all(
        torch.equal(x["image"], b) and x["image"].dtype == b.dtype for x, b in zip(batch, before)
    )


@pytest.mark.parametrize("formats", [("RGB", "BGR"), ("BGR", "RGB")])
def test_channels_are_flipped_when_the_formats_differ(formats):
    ours, theirs = formats
    model = tiny_model("RetinaNet", **OWN_STATISTICS)
    teacher = teacher_of(model, input_format=ours, student_format=theirs)
    seen = teacher.start(_batch(), (64, 64), ["neck"])["neck"]
    flipped = [{**x, "image": x["image"][[2, 1, 0]]} for x in _batch()]
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(flipped).tensor)
        other = model.backbone(model.preprocess_image(_batch()).tensor)
    for level, name in zip(seen, model.head_in_features):
        assert torch.equal(level, features[name])
        assert not torch.allclose(level, other[name])


def test_formats_that_cannot_be_converted_are_refused():
    with pytest.raises(ValueError, match="teacher's INPUT.FORMAT 'L' .* student's 'BGR'"):
        teacher_of(tiny_model("RetinaNet"), input_format="L", student_format="BGR")


@pytest.mark.parametrize("size", [(64, 100), (50, 64)])
def test_a_size_that_does_not_divide_is_an_error_naming_both(size):
    teacher = teacher_of(tiny_model("RetinaNet"))
    message = rf"{size[0]}x{size[1]}, which is no multiple of the teacher's size divisibility 32"
    with pytest.raises(ValueError, match=message):
        teacher.start(tiny_batch(sizes=[(40, 50)]), size, ["neck"])


def test_a_teacher_without_divisibility_takes_any_size():
    teacher = teacher_of(tiny_model("C4"))
    assert teacher.model.backbone.size_divisibility == 0
    images = teacher.preprocess(tiny_batch(sizes=[(40, 50)]), (41, 51))
    assert images.shape == (2, 3, 41, 51)


def test_rois_alone_are_pooled_from_an_image_of_any_size():
    """Boxes of a C4 student, whose images need not be multiples of 32: the teacher pads further,
    exactly as Detectron2 would."""
    model = tiny_model("GeneralizedRCNN")
    teacher = teacher_of(model)
    batch = tiny_batch(sizes=[(97, 131), (65, 33)])
    boxes = [x["instances"].gt_boxes for x in batch]
    found = teacher.start(batch, (97, 131), ["roi.feat"]).run(["roi.feat"], boxes)["roi.feat"]
    images = model.preprocess_image(batch)
    assert images.tensor.shape[-2:] == (128, 160)
    with torch.no_grad():
        features = model.backbone(images.tensor)
        expected = model.roi_heads.box_pooler([features[f"p{i}"] for i in range(2, 6)], boxes)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="97x131, which is no multiple"):
        teacher.start(batch, (97, 131), ["roi.feat", "neck"])


# --------------------------------------------------------------------------------- run on a batch
def test_nothing_runs_before_a_key_is_read():
    teacher = teacher_of(tiny_model("RetinaNet"))
    calls = []
    teacher.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    run = teacher.start(_batch(), (64, 64), ["neck"])
    assert calls == []
    run["neck"]
    assert calls == [1]
    assert run.model is teacher.model and run.tap is teacher.tap


def test_run_offers_rois_assignment_and_the_rest_of_the_head():
    batch = _batch()
    gt_instances = [x["instances"] for x in batch]
    boxes = [gt.gt_boxes for gt in gt_instances]
    rcnn = teacher_of(tiny_model("GeneralizedRCNN"))
    run = rcnn.start(batch, (64, 64), ["roi.cls"])
    heads = rcnn.model.roi_heads
    features = [run[f"neck.{name}"] for name in heads.box_in_features]
    logits, _ = heads.box_predictor(heads.box_head(heads.box_pooler(features, boxes)))
    assert torch.equal(run.run(["roi.cls"], boxes)["roi.cls"], logits)

    dense = teacher_of(tiny_model("GFL"))
    run = dense.start(batch, (64, 64), ["pred.cls", "head.cls[1]", "assign"], gt_instances)
    rest = run.rest_of_head("cls", 1, run["head.cls[1]"])["cls"]
    assert all(torch.equal(a, b) for a, b in zip(rest, run["pred.cls"]))
    labels, _ = dense.model.label_anchors(run["anchors"], gt_instances)
    assert torch.equal(run["assign"].labels, torch.stack(labels))


def test_gradients_cross_the_teachers_head_and_stop_there():
    teacher = teacher_of(tiny_model("GFL"))
    run = teacher.start(_batch(), (64, 64), ["head.cls[1]"])
    features = [x.clone().requires_grad_() for x in run["head.cls[1]"]]
    sum(x.sum() for x in run.rest_of_head("cls", 1, features)["cls"]).backward()
    assert all(x.grad.abs().sum() > 0 for x in features)
    assert all(p.grad is None for p in teacher.model.parameters())


# -------------------------------------------------------------------------------------- frozenness
def test_a_teacher_is_in_eval_mode_and_has_no_gradients():
    model = tiny_model("RetinaNet", **{"MODEL.RESNETS.NORM": "BN"})
    assert model.training and any(p.requires_grad for p in model.parameters())
    teacher = teacher_of(model)
    assert not any(m.training for m in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not isinstance(teacher, nn.Module)


def test_freeze_keeps_batch_norm_statistics():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    assert freeze(model) is model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(4, 1, 3, 3) + 5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# --------------------------------------------------------------------------------- built from files
def _files(tmp_path, model=None, classes=CLASSES, **overrides):
    """Student config with a RetinaNet teacher on disk, and the teacher's model."""
    config = tmp_path / "teacher.yaml"
    config.write_text(tiny_cfg("RetinaNet", **overrides).dump())
    model = model or tiny_model("RetinaNet", seed=3, **overrides)
    cfg = tiny_cfg("GFL")
    cfg.KD.TEACHER.CONFIG_FILE = str(config)
    cfg.KD.TEACHER.WEIGHTS = save_weights(model, tmp_path / "teacher.pth", classes)
    return cfg, model


def _edited_weights(cfg, edit):
    data = torch.load(cfg.KD.TEACHER.WEIGHTS, weights_only=True)
    edit(data["model"])
    torch.save(data, cfg.KD.TEACHER.WEIGHTS)


def test_teacher_from_config_and_checkpoint(tmp_path):
    cfg, model = _files(tmp_path, **OWN_STATISTICS)
    teacher = build_teacher(cfg)
    assert type(teacher) is DetectorTeacher and type(teacher.model).__name__ == "RetinaNet"
    state = teacher.state_to_copy()
    assert sorted(state) == sorted(model.state_dict())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert teacher.model.pixel_mean.flatten().tolist() == MEAN
    assert teacher.classes == list(CLASSES)
    assert teacher.keys["pred.cls"].channels == 12
    assert not teacher.model.training
    with open(cfg.KD.TEACHER.WEIGHTS, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    text = teacher.describe()
    for part in (cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS, digest, "disc, square, cross"):
        assert part in text
    assert f"{millions:.2f} M parameters" in text


def test_teachers_config_starts_from_defaults_and_options_come_last(tmp_path):
    cfg, _ = _files(tmp_path)
    (tmp_path / "short.yaml").write_text("MODEL:\n  FPN:\n    OUT_CHANNELS: 48\n")
    cfg.KD.TEACHER.CONFIG_FILE = str(tmp_path / "short.yaml")
    cfg.KD.TEACHER.OPTS = ("MODEL.RETINANET.NUM_CONVS", 3, "MODEL.DEVICE", "cuda")
    cfg.KD.ENABLED = True
    loaded = DetectorTeacher.load_config(cfg)
    assert loaded.MODEL.FPN.OUT_CHANNELS == 48
    assert loaded.MODEL.RETINANET.NUM_CONVS == 3
    assert loaded.MODEL.RESNETS.DEPTH == 50  # Detectron2's default, not the student's 18
    assert loaded.MODEL.PIXEL_STD == [1.0, 1.0, 1.0]
    assert loaded.MODEL.DEVICE == "cpu"  # where the student is
    assert loaded.KD.ENABLED is False and loaded.is_frozen()


def test_classes_come_from_the_checkpoint_before_the_registered_data(tmp_path):
    name = "toy_of_test_teacher"
    MetadataCatalog.get(name).thing_classes = ["one", "two", "three"]
    try:
        cfg, _ = _files(tmp_path, **{"DATASETS.TRAIN": (name,)})
        assert build_teacher(cfg).classes == list(CLASSES)
        cfg, _ = _files(tmp_path, classes=(), **{"DATASETS.TRAIN": (name,)})
        assert build_teacher(cfg).classes == ["one", "two", "three"]
    finally:
        MetadataCatalog.remove(name)
    cfg, _ = _files(tmp_path, classes=())
    teacher = build_teacher(cfg)
    assert teacher.classes is None and "classes: unknown" in teacher.describe()


def _without_score(state):
    del state["head.cls_score.weight"], state["head.cls_score.bias"]


def _with_stranger(state):
    state["head.stranger.weight"] = torch.zeros(3)


def _with_other_width(state):
    state["head.bbox_pred.bias"] = torch.zeros(5)


MISFITS = {
    "missing": (_without_score, r"not in the checkpoint:\n +head\.cls_score: bias, weight"),
    "unexpected": (_with_stranger, r"not in the model:\n +head\.stranger: weight"),
    "mis-shaped": (
        _with_other_width,
        r"another shape:\n +head\.bbox_pred\.bias: \(5,\) in the checkpoint, \(16,\) in the model",
    ),
}


@pytest.mark.parametrize("kind", list(MISFITS))
def test_weights_that_do_not_fit_stop_the_run_with_the_list(tmp_path, kind):
    edit, message = MISFITS[kind]
    cfg, _ = _files(tmp_path)
    _edited_weights(cfg, edit)
    with pytest.raises(ValueError, match=message) as error:
        build_teacher(cfg)
    assert cfg.KD.TEACHER.WEIGHTS in str(error.value)
    assert "KD.TEACHER.ALLOW_KEY_MISMATCH True" in str(error.value)


def test_all_misfits_are_listed_at_once(tmp_path):
    cfg, _ = _files(tmp_path)
    _edited_weights(cfg, lambda s: [edit(s) for edit, _ in MISFITS.values()])
    with pytest.raises(ValueError) as error:
        build_teacher(cfg)
    for name in ("cls_score", "stranger", "bbox_pred.bias"):
        assert name in str(error.value)


@pytest.mark.parametrize("kind", list(MISFITS))
def test_misfits_are_a_warning_when_allowed(tmp_path, kind, caplog):
    edit, _ = MISFITS[kind]
    cfg, model = _files(tmp_path)
    _edited_weights(cfg, edit)
    cfg.KD.TEACHER.ALLOW_KEY_MISMATCH = True
    with caplog.at_level(logging.WARNING, logger="kd_d2"):
        teacher = build_teacher(cfg)
    assert any("Going on because KD.TEACHER.ALLOW_KEY_MISMATCH" in m for m in caplog.messages)
    state = teacher.model.state_dict()
    misfit = {"missing": "head.cls_score.weight", "mis-shaped": "head.bbox_pred.bias"}.get(kind)
    for key, value in model.state_dict().items():
        if not key.startswith(("head.cls_score", "head.bbox_pred.bias")):
            assert torch.equal(state[key], value), key
    if kind == "missing":
        assert not torch.equal(state[misfit], model.state_dict()[misfit])


def test_a_teacher_of_another_architecture_is_a_misfit(tmp_path):
    cfg, _ = _files(tmp_path, model=tiny_model("GFL"))
    with pytest.raises(ValueError, match=r"head\.scales"):
        build_teacher(cfg)


def test_a_teacher_without_weights_is_an_error_unless_allowed(tmp_path):
    cfg, _ = _files(tmp_path)
    cfg.KD.TEACHER.WEIGHTS = ""
    with pytest.raises(ValueError, match="WEIGHTS is empty.*ALLOW_UNTRAINED True"):
        build_teacher(cfg)
    cfg.KD.TEACHER.ALLOW_UNTRAINED = True
    teacher = build_teacher(cfg)
    assert "random initialisation" in teacher.describe()
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_missing_files_and_empty_config_are_named(tmp_path):
    cfg, _ = _files(tmp_path)
    cfg.KD.TEACHER.WEIGHTS = str(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        build_teacher(cfg)
    cfg.KD.TEACHER.CONFIG_FILE = ""
    with pytest.raises(ValueError, match="KD.TEACHER.CONFIG_FILE is empty"):
        build_teacher(cfg)


def test_unknown_types_list_the_known_ones():
    cfg = tiny_cfg("GFL")
    cfg.KD.TEACHER.TYPE = "DetectorTeachr"
    with pytest.raises(ValueError, match="'DetectorTeachr' is unknown; known: .*DetectorTeacher"):
        build_teacher(cfg)


def test_a_type_of_ones_own_is_built_from_the_students_config():
    class Constant(Teacher):
        def __init__(self, cfg):
            self.number = cfg.MODEL.GFL.NUM_CLASSES

    TEACHER_REGISTRY.register(Constant)
    try:
        cfg = tiny_cfg("GFL")
        cfg.KD.TEACHER.TYPE = "Constant"
        teacher = build_teacher(cfg)
    finally:
        TEACHER_REGISTRY._obj_map.pop("Constant")
    assert teacher.number == 3
    assert teacher.keys == {} and teacher.classes is None and teacher.describe() == "Constant"
    with pytest.raises(ValueError, match="Constant has no weights that KD.INIT_STUDENT"):
        teacher.state_to_copy()
