"""What cannot work says so while it is built, with keys, both values and the mend."""

import pytest

from kd_d2.projects.gdetkd.validation import check_head_transfer, paired_stages
from tests.projects.gdetkd.pairs import OFF, distiller_of

EVERYTHING_OFF = {k: v for keys in OFF.values() for k, v in keys.items()}
HEAD = ("proposal_generator.rpn_head", "roi_heads")

ERRORS = {
    # unknown names
    "feature": ({"FEAT.MODE": "sgif"}, r"FEAT.MODE must be one of .*'sgfi'.*, got 'sgif'"),
    "level assign": ({"FEAT.LEVEL_ASSIGN": "p3"}, r"FEAT.LEVEL_ASSIGN must be one of .*got 'p3'"),
    "rois": ({"SGFI.ROIS": "negative"}, r"SGFI.ROIS must be one of .*got 'negative'"),
    "ckd rois": ({"CKD.ROIS": "some"}, r"CKD.ROIS must be one of .*got 'some'"),
    "dtype": ({"CKD.QUEUE_DTYPE": "int8"}, r"CKD.QUEUE_DTYPE must be one of .*got 'int8'"),
    "proj": ({"CKD.PROJ": "conv"}, r"CKD.PROJ must be one of .*got 'conv'"),
    "branch": ({"CKD.DENSE_BRANCH": "ctr"}, r"CKD.DENSE_BRANCH must be one of .*got 'ctr'"),
    "reg": ({"REG.MODE": "on"}, r"REG.MODE must be one of .*'caware'.*'off'.*got 'on'"),
    "hetero": ({"HETERO_PRED.CLS": "kl"}, r"HETERO_PRED.CLS must be one of .*got 'kl'"),
    "hetero reg": ({"HETERO_PRED.REG": "l2"}, r"HETERO_PRED.REG must be one of .*got 'l2'"),
    # numbers
    "weights": ({"CLS.WEIGHT": -0.5}, r"CLS.WEIGHT must be -1.0 .* at least 0, got -0.5"),
    "feature weight": ({"FEAT.WEIGHT": -2.0}, r"FEAT.WEIGHT must be -1.0 .*got -2.0"),
    "ckd weight": ({"CKD.WEIGHT": -1.0}, r"CKD.WEIGHT must be at least 0, got -1.0"),
    "reg weight": ({"REG.WEIGHT": -1.0}, r"REG.WEIGHT must be at least 0, got -1.0"),
    "queue": (
        {"CKD.QUEUE_SIZE": 47},
        r"CKD.QUEUE_SIZE is 47, .*SOLVER.IMS_PER_BATCH \* MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = "
        r"2 \* 24 = 48; make it",
    ),
    "stage": ({"TEACHER_STAGE": 1}, r"TEACHER_STAGE must lie in 0\.\.0.*got 1"),
    # things that do not go together
    "agnostic": ({"REG.MODE": "fg_weighted"}, r"CLS_AGNOSTIC_BBOX_REG is False for student and"),
    "hetero on two stages": (
        {"HETERO_PRED.CLS": "bce"},
        r'HETERO_PRED.CLS is "bce", but the student has two stages.*KD.GDETKD.CLS',
    ),
    "predicted boxes": (
        {"MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True},
        r"TRAIN_ON_PRED_BOXES is True for the student.*set it to False",
    ),
    "sigmoid student": (
        {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True},
        r"USE_SIGMOID_CE is True for the student.*CLS.WEIGHT to 0.0 and REG.MODE",
    ),
}


def full(keys):
    return {k if k.startswith(("MODEL", "KD")) else f"KD.GDETKD.{k}": v for k, v in keys.items()}


@pytest.mark.parametrize("name", ERRORS)
def test_faster_rcnn(name):
    keys, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        distiller_of(**full(keys))


CASCADE_ERRORS = {
    "student": ("Cascade", "GeneralizedRCNN", "for the student"),
    "teacher": ("GeneralizedRCNN", "Cascade", "for the teacher"),
    "both": ("Cascade", "Cascade", "for the student and teacher"),
}


@pytest.mark.parametrize("name", CASCADE_ERRORS)
def test_caware_with_an_agnostic_head(name):
    student, teacher, side = CASCADE_ERRORS[name]
    message = f'"caware".*CLS_AGNOSTIC_BBOX_REG is True {side} .*set REG.MODE to "fg_weighted"'
    with pytest.raises(ValueError, match=message):
        distiller_of(student, teacher, **{"KD.GDETKD.REG.MODE": "caware"})


def test_stages_of_a_cascade_that_do_not_exist():
    with pytest.raises(
        ValueError, match=r"CKD_STAGES is \(3,\), but the student's stages are 0..2"
    ):
        distiller_of("Cascade", "Cascade", **{"KD.GDETKD.CASCADE.CKD_STAGES": (3,)})


def test_stages_that_are_compared():
    three = dict.fromkeys(f"roi.embed[{k}]" for k in range(3))
    one, two = {"roi.embed[0]": None}, dict.fromkeys(f"roi.embed[{k}]" for k in range(2))
    assert paired_stages(3, three, 0) == (0, 1, 2)
    assert paired_stages(1, three, 2) == (2,)
    assert paired_stages(3, one, 0) == (0, 0, 0)
    assert paired_stages(1, one, 0) == (0,)
    with pytest.raises(ValueError, match="the student has 3 and the teacher 2 .*IOUS"):
        paired_stages(3, two, 0)
    for stage in (-1, 3):
        with pytest.raises(ValueError, match=rf"TEACHER_STAGE must lie in 0\.\.2.*got {stage}"):
            paired_stages(1, three, stage)


def test_other_classes():
    """Only the terms on predictions compare classes."""
    keys = {"MODEL.ROI_HEADS.NUM_CLASSES": 5}
    message = "NUM_CLASSES is 3 in the student and 5 in the teacher; train both on the same"
    with pytest.raises(ValueError, match=message):
        distiller_of(teacher_keys=keys)
    distiller = distiller_of(teacher_keys=keys, **{**OFF["cls"], **OFF["reg"]})
    assert distiller.terms == ("feat", "ckd")


def test_a_teacher_of_single_sigmoids():
    keys = {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True}
    with pytest.raises(ValueError, match="USE_SIGMOID_CE is True for the teacher"):
        distiller_of(teacher_keys=keys)
    with pytest.raises(ValueError, match="USE_SIGMOID_CE is True for the teacher"):
        distiller_of(teacher_keys=keys, **OFF["cls"])  # CAReg reads its softmax, too
    assert distiller_of(teacher_keys=keys, **{**OFF["cls"], **OFF["reg"]}).weights


def test_one_class_is_specific_and_agnostic_at_once():
    for mode in ("caware", "fg_weighted"):
        keys = {"MODEL.ROI_HEADS.NUM_CLASSES": 1, "KD.GDETKD.REG.MODE": mode}
        assert "reg" in distiller_of(**keys).terms


def test_a_dense_teacher():
    with pytest.raises(ValueError, match="needs a two-stage teacher.*'roi.cls'"):
        distiller_of("RetinaNet", "RetinaNet")


DENSE_ERRORS = {
    "cls": ({"CLS.WEIGHT": 1.0}, "CLS.WEIGHT is 1.0, but a dense student"),
    "reg": ({"REG.MODE": "caware"}, 'REG.MODE is "caware".*student is dense'),
    "queue": ({"DENSE.NUM_SAMPLES": 49}, r"IMS_PER_BATCH \* KD.GDETKD.DENSE.NUM_SAMPLES = 2 \* 49"),
    **{
        mode: ({"FEAT.MODE": mode}, f"FEAT.MODE '{mode}' is for two-stage .* dense; use 'gt_mask'")
        for mode in ("whole", "anchor_mask", "gaussian_mask")
    },
    "transfer": (
        {"KD.INIT_STUDENT.PREFIXES": HEAD},
        "PREFIXES .*roi_heads.* which a dense student does not have; set PREFIXES",
    ),
}


@pytest.mark.parametrize("name", DENSE_ERRORS)
def test_dense_students(name):
    keys, message = DENSE_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        distiller_of("RetinaNet", "GeneralizedRCNN", **full(keys))


@pytest.mark.parametrize("key, value", [("CLS", "max_norm"), ("REG", "l1")])
def test_hetero_prediction_is_for_retinanet(key, value):
    keys = {f"KD.GDETKD.HETERO_PRED.{key}": value}
    assert key.lower() in distiller_of("RetinaNet", **keys).terms
    with pytest.raises(ValueError, match="HETERO_PRED is supported for RetinaNet only"):
        distiller_of("FCOS", **keys)


def test_prefixes_of_a_dense_student():
    check_head_transfer(("backbone",), "dense")
    check_head_transfer(HEAD, "two_stage")
    with pytest.raises(ValueError, match=r"\('roi_heads.box_head',\)"):
        check_head_transfer(("backbone", "roi_heads.box_head"), "dense")


def test_nothing_to_distil():
    with pytest.raises(ValueError, match="every term of GDetKD is off: .*KD.ENABLED to False"):
        distiller_of(**EVERYTHING_OFF)
    # head transfer alone, Table 2 "HT"
    distiller = distiller_of(**EVERYTHING_OFF, **{"KD.INIT_STUDENT.PREFIXES": HEAD})
    assert distiller.terms == ()
