"""What DICOD refuses when it is built, with the keys, the values and a mend in the message."""

import pytest

from kd_d2.distillation import build_distillers, build_tap, teacher_wanted
from kd_d2.projects.dicod.distiller import DICOD
from tests.fixtures import teacher_of, tiny_cfg, tiny_model
from tests.projects.dicod.detectors import KEYS, OFF, classifier_teacher, detector, only

LOC = "KD.DICOD.LOC"


def refused(student="SSD", message="", teacher=True, **keys):
    with pytest.raises(ValueError, match=message):
        detector(student, teacher=teacher, **keys)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"KD.DICOD.CLS.WEIGHT": -0.4}, "KD.DICOD.CLS.WEIGHT must be at least 0, got -0.4"),
        ({f"{LOC}.OBJ_WEIGHT": float("nan")}, "LOC.OBJ_WEIGHT must be at least 0, got nan"),
        ({f"{LOC}.FEAT_WEIGHT": -1.0}, "LOC.FEAT_WEIGHT must be at least 0, got -1.0"),
        ({f"{LOC}.CHUNK": 0}, "LOC.CHUNK must be at least 1, got 0"),
        ({f"{LOC}.SAMPLE_SIZE": 0}, "LOC.SAMPLE_SIZE must be at least 1, got 0"),
        ({f"{LOC}.OBJ_POOL": 0}, "LOC.OBJ_POOL must be at least 1, got 0"),
        ({f"{LOC}.OBJ_POOL": 33}, "OBJ_POOL is 33, .*SAMPLE_SIZE 32; make it at most that"),
        ({"KD.DICOD.CLS.T": 0.0}, "KD.DICOD.CLS.T must be positive and finite, got 0.0"),
        ({"KD.DICOD.CLS.MODE": "KL"}, r"CLS.MODE must be one of \['BinaryKL', .*, got 'KL'"),
        (
            {"KD.DICOD.CLS.MODE": "BinaryKL"},
            "'BinaryKL' is for students with a sigmoid, .* a softmax; use 'auto' or SoftmaxKL",
        ),
        ({f"{LOC}.FEAT_LAYERS": []}, "FEAT_LAYERS is empty; name some of .*FEAT_WEIGHT to 0.0"),
        ({f"{LOC}.FEAT_LAYERS": ["l0"]}, "FEAT_LAYERS must be one of .*'stem'.*, got 'l0'"),
        (
            {f"{LOC}.FEAT_LAYERS": ["stem", "stem"], f"{LOC}.FEAT_POOLS": [4, 4]},
            "FEAT_LAYERS names a layer twice",
        ),
        ({f"{LOC}.FEAT_POOLS": [4, 8]}, r"FEAT_POOLS \[4, 8\] must have one entry for each of"),
        ({f"{LOC}.FEAT_POOLS": [0]}, "LOC.FEAT_POOLS must be at least 1, got 0"),
        (
            {f"{LOC}.FEAT_POOLS": [9]},
            "9x9 cells of 'stem', whose map .*SAMPLE_SIZE 32 pixels has 8x8; use at most 8",
        ),
        (
            {f"{LOC}.FEAT_LAYERS": ["layer3"], f"{LOC}.SAMPLE_SIZE": 40},
            "8x8 cells of 'layer3', .* has 3x3; use at most 3",
        ),
        ({k: v for keys in OFF.values() for k, v in keys.items()}, "every term of DICOD is off"),
    ],
)
def test_values(keys, message):
    refused(message=message, **keys)


def test_largest_pools_are_fine():
    keys = {f"{LOC}.OBJ_POOL": 32, f"{LOC}.FEAT_POOLS": [8], f"{LOC}.CHUNK": 1}
    model = detector("SSD", **keys)
    assert model.distillers["dicod"].pools == {"obj": 32, "stem": 8}


def test_a_mode_for_another_kind_of_scores():
    message = "'SoftmaxKL' is for students with a softmax, .* sigmoid; use .*BinaryKL or SigmoidL1"
    refused("RetinaNet", message, **{"KD.DICOD.CLS.MODE": "SoftmaxKL"})


def test_teachers():
    no_classifier = "KD.TEACHER.TYPE is 'DetectorTeacher'; set it to 'ClassifierTeacher' and"
    other = teacher_of(tiny_model("SSD", seed=4), student_format="RGB")
    refused("SSD", no_classifier, teacher=other, **{"KD.TEACHER.TYPE": "DetectorTeacher"})
    four = classifier_teacher(tiny_cfg("SSD"), classes=["a", "b", "c", "d"])
    refused("SSD", "the student has 3 .* and the classifier of KD.TEACHER.WEIGHTS 4;", teacher=four)
    # early features do not depend on the classes
    model = detector("SSD", teacher=four, **only("loc_feat"))
    assert tuple(model.distillers["dicod"].weights) == ("loc_feat",)


def test_students():
    refused(
        "GeneralizedRCNN",
        "TRAIN_ON_PRED_BOXES is True for the student",
        model_keys={"MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True},
    )
    # a leftover of a two-stage base does not matter for others
    detector("SSD", **{"MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True})
    cfg = tiny_cfg("SSD", **KEYS)
    with pytest.raises(ValueError, match="DICOD needs a student with an RoI head"):
        build_distillers(cfg, {}, classifier_teacher(cfg).keys)


@pytest.mark.parametrize(
    "terms, wanted",
    [
        ((), False),
        (("loc_obj",), False),
        (("loc_feat",), True),
        (("cls",), True),
        (("cls", "loc_obj", "loc_feat"), True),
    ],
)
def test_whether_a_teacher_is_built(terms, wanted):
    cfg = tiny_cfg("SSD", **{**KEYS, **only(*terms)})
    assert DICOD.wants_teacher(cfg) == teacher_wanted(cfg) == wanted
    off = tiny_cfg("SSD", **{**KEYS, "KD.DICOD.CLS.ENABLED": False, f"{LOC}.ENABLED": False})
    assert not teacher_wanted(off)


def test_flags_and_weights_that_switch_a_term_off():
    model = detector("SSD", **{"KD.DICOD.CLS.WEIGHT": 0.0})
    assert set(model.distillers["dicod"].weights) == {"loc_obj", "loc_feat"}
    assert "crops.logits" not in model.distillers["dicod"].teacher_needs
    model = detector("SSD", **{f"{LOC}.ENABLED": False})
    assert model.distillers["dicod"].weights == {"cls": 0.4}
    assert model.distillers["dicod"].teacher_needs == {"crops.logits"}


def test_defaults():
    student = tiny_model("SSD")
    cfg = tiny_cfg("SSD", **{k: v for k, v in KEYS.items() if "DICOD.LOC" not in k})
    teacher = classifier_teacher(cfg, input_size=112)
    distillers, _ = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    found = distillers["dicod"]
    assert found.weights == {"cls": 0.4, "loc_obj": 0.15, "loc_feat": 0.15}
    assert found.pools == {"obj": 4, "stem": 8} and found.mode.temperature == 2
    assert (found._logits_size, found._sample_size, found._chunk) == (112, 112, 256)
