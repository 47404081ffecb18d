"""The classifier as a teacher: normalisation, gradients, and the files it refuses."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from kd_d2.distillation import Teacher, build_teacher
from kd_d2.engine.trainer import check_classes
from kd_d2.projects.dicod.teacher import ClassifierTeacher, load_classifier
from tests.fixtures import tiny_cfg, tiny_model
from tests.projects.dicod.crop_cases import (
    CLASSES,
    MEAN,
    STD,
    annotation,
    coco_dataset,
    small_classifier,
)

ROOT = Path(__file__).parents[3]


def lively(seed=0, **changes):
    """A classifier whose statistics are not those of the initialisation."""
    torch.manual_seed(seed)
    model = small_classifier(**changes)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model


def teacher_of(model, mean=MEAN, std=STD, image_format="RGB", **changes):
    arguments = {"student_mean": mean, "student_std": std, "student_format": image_format}
    return ClassifierTeacher(model=model, **arguments, **changes)


def normalised(raw, mean, std):
    return (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


RAW = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 255
STUDENTS = {
    "same": (MEAN, STD, "RGB"),
    "std 1": (MEAN, [1.0, 1.0, 1.0], "RGB"),
    "bgr": (MEAN[::-1], STD[::-1], "BGR"),
    "bgr, std 1": ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0], "BGR"),
    "other mean": ([100.0, 110.0, 120.0], [50.0, 60.0, 70.0], "BGR"),
}


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("native", ["RGB", "BGR"])
def test_every_normalisation_gives_the_logits_of_the_native_one(student, native):
    mean, std, order = STUDENTS[student]
    model = lively(image_format=native, pixel_mean=MEAN, pixel_std=STD)
    own = RAW if native == "RGB" else RAW.flip(1)  # RAW is RGB
    expected = model.eval().logits(normalised(own, MEAN, STD))
    crops = normalised(RAW if order == "RGB" else RAW.flip(1), mean, std)
    teacher = teacher_of(model, mean, std, order)
    torch.testing.assert_close(teacher.logits(crops), expected, rtol=1e-4, atol=1e-4)
    assert (teacher.normalise(crops) is crops) == (student == "same" and native == "RGB")
    features = teacher.features(crops, ["stem", "layer1"])
    theirs = model.features(normalised(own, MEAN, STD), ["stem", "layer1"])
    for layer in features:
        torch.testing.assert_close(features[layer], theirs[layer], rtol=1e-4, atol=1e-4)
    assert expected.std() > 1e-3


def test_formats_that_have_nothing_in_common():
    with pytest.raises(ValueError, match="'L' .* 'RGB'|'RGB' .* 'L'"):
        teacher_of(lively(), image_format="L")


def test_gradients_reach_the_crops_and_no_weight():
    model = lively()
    teacher = teacher_of(model, STUDENTS["bgr, std 1"][0], [1.0] * 3, "BGR")
    crops = (torch.randn(2, 3, 32, 32) * 50).requires_grad_()
    features = teacher.features(crops, ["layer1", "stem"])
    (features["stem"].sum() + features["layer1"].square().sum()).backward()
    assert crops.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not teacher.logits(crops).requires_grad
    with torch.no_grad():
        assert not teacher.features(crops)["stem"].requires_grad

    # along one direction, against central differences
    point = crops.detach().double()
    direction = torch.randn_like(point)
    double = teacher_of(lively().double(), STUDENTS["bgr, std 1"][0], [1.0] * 3, "BGR")

    def value(x):
        return double.features(x, ["stem"])["stem"].square().sum()

    x = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    numeric = (value(point + 1e-5 * direction) - value(point - 1e-5 * direction)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-5)


def test_it_stays_as_it_is():
    model = lively()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher = teacher_of(model.train(), channels_last=True)
    assert isinstance(teacher, Teacher) and not isinstance(teacher, torch.nn.Module)
    assert teacher.start([], (32, 32), []) is teacher
    holder = torch.nn.Linear(1, 1)
    holder.teacher = teacher
    holder.train()
    crops = torch.randn(4, 3, 32, 32)
    first = teacher.logits(crops)
    teacher.features(crops.requires_grad_(), ["layer4"])["layer4"].sum().backward()
    assert torch.equal(teacher.logits(crops), first)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(holder.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("size", [32, 45])
def test_keys_say_what_it_makes_of_crops(arch, size):
    teacher = teacher_of(small_classifier(arch=arch, input_size=size))
    crops = torch.zeros(1, 3, size, size)
    logits = teacher.keys.pop("crops.logits")
    assert logits.channels == teacher.logits(crops).shape[1] == 3
    assert logits.signature == (teacher.input_size,) == (size,)
    features = teacher.features(crops, ["stem", "layer1", "layer2", "layer3", "layer4"])
    assert list(teacher.keys) == [f"crops.{stage}" for stage in features]
    for stage, value in features.items():
        (level,) = teacher.keys[f"crops.{stage}"].levels
        assert value.shape[1:] == (level[1], -(-size // level[0]), -(-size // level[0])), stage


def test_crops_of_another_size():
    teacher = teacher_of(lively())
    with pytest.raises(ValueError, match="32x32 pixels, got 32x30"):
        teacher.logits(torch.zeros(1, 3, 32, 30))
    assert teacher.features(torch.zeros(1, 3, 56, 56))["stem"].shape == (1, 64, 14, 14)
    assert teacher.logits(torch.zeros(0, 3, 32, 32)).shape == (0, 3)


# ------------------------------------------------------------------------------------- files
def stored(path, model, **facts):
    torch.save({"model": model.state_dict(), "run_info": {**model.metadata(), **facts}}, path)
    return str(path)


def student_cfg(weights, **changes):
    values = {
        "KD.ENABLED": True,
        "KD.TEACHER.TYPE": "ClassifierTeacher",
        "KD.TEACHER.WEIGHTS": weights,
        "KD.TEACHER.CLASSIFIER.ARCH": "resnet18",
        "KD.TEACHER.CLASSIFIER.INPUT_SIZE": 32,
        **changes,
    }
    return tiny_cfg("RetinaNet", **values)


def test_teacher_from_a_file(tmp_path):
    model = lively(losses=("cross_entropy", "focal"))
    teacher = build_teacher(student_cfg(stored(tmp_path / "teacher.pth", model)))
    assert isinstance(teacher, ClassifierTeacher) and teacher.classes == CLASSES
    assert teacher.input_size == 32
    # the student of the fixtures is BGR with the std
    crops = normalised(RAW.flip(1), [103.53, 116.28, 123.675], [57.375, 57.12, 58.395])
    expected = model.eval().logits(normalised(RAW, MEAN, STD))
    torch.testing.assert_close(teacher.logits(crops), expected, rtol=1e-4, atol=1e-4)
    text = teacher.describe()
    for part in ("resnet18", "32 pixels", "cross_entropy and focal", "disc, square", "sha256"):
        assert part in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"KD.TEACHER.CLASSIFIER.INPUT_SIZE": 112}, "INPUT_SIZE is 112, .* with 32"),
        ({"KD.TEACHER.CLASSIFIER.ARCH": "resnet50"}, "ARCH is resnet50, .* with resnet18"),
        ({"INPUT.FORMAT": "L"}, "cannot be made from the student's"),
        ({"KD.TEACHER.WEIGHTS": ""}, "WEIGHTS is empty"),
        ({"KD.TEACHER.WEIGHTS": "no_such_file.pth"}, "does not exist"),
    ],
)
def test_config_and_file_must_agree(tmp_path, changes, message):
    file = stored(tmp_path / "teacher.pth", lively())
    with pytest.raises(ValueError, match=message):
        build_teacher(student_cfg(file, **changes))


def test_keys_that_do_not_fit_are_all_reported(tmp_path):
    model = lively()
    checkpoint = {"model": dict(model.state_dict()), "run_info": model.metadata()}
    del checkpoint["model"]["layer2.0.conv1.weight"]
    checkpoint["model"]["layer9.weight"] = torch.zeros(1)
    checkpoint["model"]["fc.weight"] = torch.zeros(4, 512)
    file = str(tmp_path / "teacher.pth")
    torch.save(checkpoint, file)
    with pytest.raises(ValueError) as error:
        build_teacher(student_cfg(file))
    for part in ("layer2.0.conv1: weight", "layer9: weight", "(4, 512) in the checkpoint"):
        assert part in str(error.value)
    build_teacher(student_cfg(file, **{"KD.TEACHER.ALLOW_KEY_MISMATCH": True}))


def test_a_file_that_says_nothing_about_itself(tmp_path):
    torch.save({"model": lively().state_dict()}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match="does not say arch, classes, .*convert_classifier.py"):
        load_classifier(str(tmp_path / "teacher.pth"))


def test_a_program_in_the_file_is_not_run(tmp_path):
    torch.save({"model": lively().state_dict(), "run_info": Path("x")}, tmp_path / "teacher.pth")
    with pytest.raises(ValueError, match="KD.ALLOW_UNSAFE_LOAD"):
        load_classifier(str(tmp_path / "teacher.pth"))


@pytest.mark.parametrize(
    "classes, message",
    [(CLASSES[::-1], "0: student 'disc', teacher 'cross'"), (CLASSES[:2], "the teacher 2")],
)
def test_the_trainer_refuses_other_classes(tmp_path, classes, message):
    teacher = teacher_of(lively(classes=classes))
    with coco_dataset(tmp_path, [annotation([1, 1, 9, 9])]) as name:
        from kd_d2.data import dataset_classes

        assert dataset_classes(name) == CLASSES
        cfg = student_cfg("", **{"DATASETS.TRAIN": (name,)})
        with pytest.raises(ValueError, match=message):
            check_classes(cfg, tiny_model("RetinaNet"), teacher)


def test_an_untrained_teacher_on_request(tmp_path):
    with coco_dataset(tmp_path, [annotation([1, 1, 9, 9])]) as name:
        changes = {"KD.TEACHER.ALLOW_UNTRAINED": True, "DATASETS.TRAIN": (name,)}
        teacher = build_teacher(student_cfg("", **changes))
    crops = torch.zeros(1, 3, 32, 32)
    assert teacher.classes == CLASSES and teacher.normalise(crops) is crops


def test_converter_adds_what_other_programs_do_not_store(tmp_path, capsys):
    path = ROOT / "projects/DICOD/tools/convert_classifier.py"
    spec = importlib.util.spec_from_file_location("convert_classifier", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    torch.manual_seed(4)
    theirs = resnet18(num_classes=3).eval()
    state = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    source, target = tmp_path / "model_best.pth.tar", tmp_path / "classifier.pth"
    torch.save({"epoch": 90, "best_acc1": torch.tensor(80.0), "state_dict": state}, source)
    with coco_dataset(tmp_path, [annotation([1, 1, 9, 9])]) as name:
        options = ["--input", source, "--output", target, "--dataset", name, "--format", "RGB"]
        options += ["--input-size", 32, "--pixel-mean", *MEAN, "--pixel-std", 1, 1, 1]
        tool.main([str(x) for x in [*options, "--arch", "resnet18"]])
        with pytest.raises(SystemExit, match="does not fit resnet34"):
            tool.main([str(x) for x in [*options, "--arch", "resnet34"]])
    assert "11.18 M parameters" in capsys.readouterr().out
    model = load_classifier(str(target)).eval()
    assert model.metadata()["classes"] == CLASSES
    assert model.metadata()["pixel_std"] == [1.0, 1.0, 1.0]
    crops = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.logits(crops), theirs(crops))
