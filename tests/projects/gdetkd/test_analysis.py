"""Figures 5 and 6: the pure computations, what is observed, and the commands."""

import functools
import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from PIL import Image

from kd_d2.distillation import KDModel, build_distillers, build_tap
from kd_d2.projects.gdetkd.analysis.class_correlation import (
    class_correlation,
    foreground_logits,
    mean_off_diagonal,
)
from kd_d2.projects.gdetkd.analysis.level_matching import (
    LevelMatches,
    histogram,
    level_weights,
    teacher_levels,
)
from kd_d2.projects.gdetkd.analysis.observer import RoIObserver
from kd_d2.projects.gdetkd.records import build_student_rois
from tests.engine.support import ROOT, importable_tools
from tests.fixtures import (
    CLASSES,
    registered_toy_dataset,
    save_weights,
    teacher_of,
    tiny_batch,
    tiny_cfg,
    tiny_model,
)

POOLER = {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7}


# ---------------------------------------------------------------------------- class correlation
def test_an_affine_student_has_the_teachers_correlation():
    """Specification, item 14."""
    teacher = np.random.default_rng(0).normal(size=(40, 5))
    difference = class_correlation(teacher) - class_correlation(2 * teacher + 3)
    assert np.abs(difference).max() < 1e-12


def test_correlation_equals_a_loop():
    values = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)
    found = class_correlation(values)
    for a in range(3):
        for b in range(3):
            x, y = (values[:, k].astype(float) - values[:, k].astype(float).mean() for k in (a, b))
            expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
            assert found[a, b] == pytest.approx(expected, abs=1e-12)


# 0.1 has no exact mean: the rounding of a sum of many must not look like a deviation
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 + 0.1])
def test_a_constant_column_correlates_with_nothing(constant):
    values = np.random.default_rng(2).normal(size=(1000, 3))
    values[:, 1] = constant
    found = class_correlation(values)
    assert np.isfinite(found).all()
    assert not found[1].any() and not found[:, 1].any()
    assert found[0, 0] == pytest.approx(1) and found[0, 2] != 0


def test_one_class_and_too_few_rows():
    assert class_correlation(np.array([[1.0], [2.0]])).shape == (1, 1)
    with pytest.raises(ValueError, match="at least 2 foreground RoIs, got 1"):
        class_correlation(np.zeros((1, 3)))


def test_mean_beside_the_diagonal():
    matrix = np.array([[9.0, 1.0, 2.0], [1.0, 9.0, 6.0], [2.0, 6.0, 9.0]])
    assert mean_off_diagonal(matrix) == 3.0
    assert mean_off_diagonal(np.ones((1, 1))) == 0.0


# -------------------------------------------------------------------------------- level matching
def test_teacher_levels_by_size():
    """Specification, item 5: the side of a square box, P2-P5."""
    sides = {111: 0, 112: 1, 223: 1, 224: 2, 447: 2, 448: 3, 1333: 3}
    boxes = [Boxes(torch.tensor([[0.0, 0.0, side, side]])) for side in sides]
    assert teacher_levels(boxes, (4, 8, 16, 32)).tolist() == list(sides.values())
    # a C4 head has one level
    assert teacher_levels(boxes, (16,)).tolist() == [0] * len(sides)


def one_hot(*levels, count=5):
    return np.eye(count)[list(levels)]


def test_dense_student_of_a_two_stage_teacher():
    """The same physical level is index difference -1 where the student starts with P3."""
    matches = LevelMatches(
        # P3 P3 P4 P5 P7
        alpha=one_hot(0, 0, 1, 2, 4),
        # P3 P2 P4 P4 P5
        teacher_level=np.array([1, 0, 2, 2, 3]),
        student_strides=(8, 16, 32, 64, 128),
        teacher_strides=(4, 8, 16, 32),
    )
    assert matches.index_difference.tolist() == [-1, 0, -1, 0, 1]
    assert matches.level_difference.tolist() == [0, 1, 0, 1, 2]
    found = matches.summary()
    assert found["index_difference"] == {-1: 0.4, 0: 0.4, 1: 0.2}
    assert found["level_difference"] == {0: 0.4, 1: 0.4, 2: 0.2}
    assert found["level_difference_mode"] == 0 and found["rois"] == 5
    assert found["mean_alpha"] == {"p3": 0.4, "p4": 0.2, "p5": 0.2, "p6": 0.0, "p7": 0.2}
    counts = np.array(found["counts"])
    assert counts.shape == (5, 4) and counts.sum() == 5
    assert counts[0].tolist() == [1, 1, 0, 0] and counts[4, 3] == 1


def test_homogeneous_pair():
    matches = LevelMatches(
        alpha=np.array([[0.1, 0.5, 0.2, 0.1, 0.1], [0.3, 0.3, 0.2, 0.1, 0.1]]),
        teacher_level=np.array([1, 3]),
        student_strides=(4, 8, 16, 32, 64),
        teacher_strides=(4, 8, 16, 32),
    )
    # of equal weights the finest level counts
    assert matches.index_difference.tolist() == matches.level_difference.tolist() == [0, -3]
    assert matches.summary()["index_difference"] == {-3: 0.5, -2: 0, -1: 0, 0: 0.5}
    assert matches.summary()["mean_alpha"]["p2"] == pytest.approx(0.2)


def test_no_roi():
    assert histogram(np.zeros(0, dtype=int)) == {}
    found = LevelMatches(np.zeros((0, 2)), np.zeros(0, dtype=int), (8, 16), (4, 8)).summary()
    assert found["index_difference_mode"] is None
    assert found["mean_alpha"] == {"p3": 0.0, "p4": 0.0}


# -------------------------------------------------------------------------------- observation
@functools.lru_cache(maxsize=None)
def shared_teacher():
    return teacher_of(tiny_model("GeneralizedRCNN", 1, **POOLER))


def gdetkd(name, student):
    cfg = tiny_cfg(name, **{"KD.DISTILLERS": ("GDetKD",), "KD.GDETKD.CKD.QUEUE_SIZE": 2048})
    teacher = shared_teacher()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return build_distillers(cfg, build_tap(student).keys(student), teacher.keys)[0]


@pytest.mark.parametrize("name", ["RetinaNet", "GeneralizedRCNN"])
def test_weights_are_those_of_training(name):
    student, teacher = tiny_model(name), shared_teacher()
    distillers = gdetkd(name, student)
    (distiller,) = distillers.values()
    term, seen = distiller.feature, []
    model = KDModel(student=student, distillers=distillers, teacher=teacher).train()
    batch = tiny_batch()
    handle = term.sgfi.register_forward_hook(lambda *call: seen.append(call[2].alpha))
    with EventStorage(0):
        seed_all_rng(11)
        model(batch)
    handle.remove()
    observer = RoIObserver(
        student,
        teacher,
        distiller.rois,
        functools.partial(level_weights, term, teacher.keys["neck"].strides),
        term.student_needs,
        term.teacher_needs,
    )
    seed_all_rng(11)
    found = observer(batch)
    assert len(seen[0]) > 5
    np.testing.assert_allclose(found["alpha"], seen[0].numpy(), atol=1e-6)
    assert len(found["boxes"]) == len(found["teacher_level"]) == len(seen[0])
    assert (found["gt_classes"] < len(CLASSES)).all()


def test_observed_student_stands_still():
    student = tiny_model("GeneralizedRCNN", **{"MODEL.RESNETS.NORM": "BN"})
    before = {name: x.clone() for name, x in student.state_dict().items()}
    rois = build_student_rois(tiny_cfg("GeneralizedRCNN"), build_tap(student).keys(student))
    observer = RoIObserver(student, shared_teacher(), rois, lambda ctx, batch: batch.counts)
    # sampled as in training, with the ground truth
    assert observer(tiny_batch()) == [24, 24]
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(m.training for m in student.backbone.modules())


@pytest.mark.parametrize("name", ["RetinaNet", "GeneralizedRCNN", "Cascade"])
def test_logits_of_both_sides_belong_to_the_same_boxes(name):
    student, teacher = tiny_model(name), shared_teacher()
    rois = build_student_rois(tiny_cfg(name), build_tap(student).keys(student))
    rois.outputs = True
    kept = []

    def look(ctx, batch):
        kept.append((batch, ctx.teacher))
        return foreground_logits(0, ctx, batch)

    seed_all_rng(0)
    found = RoIObserver(student, teacher, rois, look, teacher_needs=["roi.cls[0]"])(tiny_batch())
    (batch, run), number = kept[0], len(CLASSES)
    positive = batch.positive.numpy()
    assert positive.any() and not positive.all()
    assert np.array_equal(found["student"], batch.cls[:, :number].numpy()[positive])
    everything = run.run(["roi.cls"], batch.boxes)["roi.cls"].numpy()
    np.testing.assert_allclose(found["teacher"], everything[positive, :number], atol=1e-5)


# ------------------------------------------------------------------------------------- commands
TOOLS = ROOT / "projects" / "GDetKD" / "tools"


@pytest.fixture
def command():
    with importable_tools(TOOLS) as import_tool:
        yield import_tool


@pytest.fixture
def files(tmp_path):
    """Arguments for a config with a teacher, and a checkpoint of a distilled run."""

    def write(arch, **overrides):
        data = {"DATASETS.TRAIN": (name,), "DATASETS.TEST": (name,)}
        distilled = {
            "KD.ENABLED": True,
            "KD.DISTILLERS": ("GDetKD",),
            "KD.GDETKD.CKD.QUEUE_SIZE": 2048,
            "KD.TEACHER.CONFIG_FILE": "teacher.yaml",
            "KD.TEACHER.WEIGHTS": str(tmp_path / "teacher.pth"),
        }
        teacher_cfg = tiny_cfg("GeneralizedRCNN", **data, **POOLER)
        (tmp_path / "teacher.yaml").write_text(teacher_cfg.dump())
        save_weights(shared_teacher().model, tmp_path / "teacher.pth", CLASSES)
        config = tmp_path / "student.yaml"
        config.write_text(tiny_cfg(arch, **data, **{**distilled, **overrides}).dump())
        student = tiny_model(arch)
        distillers = gdetkd(arch, student).state_dict()
        path = save_weights(student, tmp_path / "run.pth", CLASSES, distillers=distillers)
        return ["--config-file", str(config), "--output", str(tmp_path / "out")], path

    with registered_toy_dataset(tmp_path, 3) as name:
        yield write


def is_picture(path):
    return len(Image.open(path).convert("L").getcolors(maxcolors=256)) > 10


@pytest.mark.parametrize("arch", ["RetinaNet", "GeneralizedRCNN"])
def test_level_matching(command, files, tmp_path, arch):
    arguments, path = files(arch)
    command("level_matching").main([*arguments, "--weights", path, "--num-images", "2"])
    out = tmp_path / "out"
    assert is_picture(out / "level_matching.png")
    facts = json.loads((out / "level_matching.json").read_text())
    stored = np.load(out / "level_matching.npz")
    assert facts["rois"] == len(stored["alpha"]) == np.sum(facts["counts"]) > 2
    assert facts["student_strides"][0] == (8 if arch == "RetinaNet" else 4)
    assert len(stored["image"]) == len(stored["alpha"]) and stored["boxes"].shape[1] == 4
    difference = stored["alpha"].argmax(axis=1) - stored["teacher_level"]
    shares = {int(k): v for k, v in facts["index_difference"].items()}
    for value, share in shares.items():
        assert share == pytest.approx((difference == value).mean())
    assert sum(shares.values()) == pytest.approx(1)


def test_class_correlation(command, files, tmp_path):
    arguments, path = files("RetinaNet")
    other = save_weights(tiny_model("RetinaNet", 4), tmp_path / "other.pth", CLASSES)
    models = ["--model", f"first={path}", "--model", f"again={path}", "--model", f"other={other}"]
    command("class_correlation").main([*arguments, *models, "--num-images", "3"])
    out = tmp_path / "out"
    assert is_picture(out / "class_correlation.png")
    found = json.loads((out / "class_correlation.json").read_text())["students"]
    assert {**found["first"], "weights": ""} == {**found["again"], "weights": ""}
    assert found["first"]["mean_off_diagonal"] != found["other"]["mean_off_diagonal"]
    stored = np.load(out / "class_correlation.npz")
    expected = np.abs(stored["first.student"] - stored["first.teacher"])
    assert np.array_equal(stored["first.difference"], expected)
    np.testing.assert_allclose(np.diag(stored["first.student"]), 1)
    assert found["first"]["mean_off_diagonal"] == pytest.approx(mean_off_diagonal(expected))


@pytest.mark.parametrize(
    "overrides, changed, message",
    [
        ({"KD.GDETKD.FEAT.MODE": "roifi"}, None, "with KD.GDETKD.FEAT.MODE 'sgfi'"),
        ({}, {"distillers": None}, "has no entry 'distillers'"),
        ({"KD.GDETKD.SGFI.KEY_DIM": 64}, None, "other distillers"),
    ],
)
def test_what_has_no_weights_of_levels_is_named(
    command, files, tmp_path, capsys, overrides, changed, message
):
    arguments, path = files("RetinaNet", **overrides)
    if changed:
        path = save_weights(tiny_model("RetinaNet"), tmp_path / "plain.pth", CLASSES)
    with pytest.raises(SystemExit) as error:
        command("level_matching").main([*arguments, "--weights", path])
    assert message in str(error.value) + capsys.readouterr().err
