"""The node: defaults of the specification, presets by family, and a comment for every key."""

import re
from pathlib import Path

import pytest

from kd_d2.projects.gdetkd import config
from tests.fixtures import tiny_cfg
from tests.projects.gdetkd.pairs import ALL_TERMS, distiller_of

DEFAULTS = {
    "FEAT.MODE": "sgfi",
    "FEAT.LEVEL_ASSIGN": "all",
    "FEAT.ADAPT_RELU": False,
    "SGFI.STUDENT_LEVELS": "all",
    "SGFI.ROIS": "positive",
    "SGFI.KEY_DIM": 128,
    "SGFI.TAU_INIT": 0.0,
    "SGFI.SAMPLING_RATIO": 4,
    "SGFI.CHUNK": 0,
    "SGFI.MAX_ROIS_PER_IMAGE": 128,
    "CKD.ENABLED": True,
    "CKD.WEIGHT": 1.0,
    "CKD.QUEUE_SIZE": 80 * 1024,
    "CKD.QUEUE_DTYPE": "float32",
    "CKD.GAMMA": 0.07,
    "CKD.DIM": 128,
    "CKD.PROJ": "linear",
    "CKD.IOU_THR": 0.5,
    "CKD.ROIS": "all",
    "CKD.GRAD_THROUGH_QUEUE": True,
    "CKD.CHUNK": 256,
    "CKD.DENSE_BRANCH": "cls",
    "REG.WEIGHT": 1.0,
    "DENSE.NUM_SAMPLES": 512,
    "DENSE.POS_FRACTION": 0.25,
    "DENSE.POS_IOU": 0.5,
    "DENSE.STRICT_RATIO": False,
    "HETERO_PRED.CLS": "off",
    "HETERO_PRED.REG": "off",
    "CASCADE.CKD_STAGES": (0, 1, 2),
    "TEACHER_STAGE": 0,
    "SCHEDULE.WARMUP_ITERS": 0,
}


def value(node, key):
    for part in key.split("."):
        node = node[part]
    return node


@pytest.mark.parametrize("key", DEFAULTS)
def test_defaults_of_the_specification(key):
    assert value(tiny_cfg("RetinaNet").KD.GDETKD, key) == DEFAULTS[key]


def test_every_key_is_told_about():
    lines = Path(config.__file__).read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"    node\.\w+(\.\w+)? = [^C]", line)]
    assert len(keys) == len(DEFAULTS) - 1 + 3  # no schedule; the three presets
    for i in keys:
        assert lines[i - 1].strip().startswith("#"), lines[i]


@pytest.mark.parametrize(
    "student, teacher, weights, mode",
    [
        ("GeneralizedRCNN", "GeneralizedRCNN", dict.fromkeys(ALL_TERMS, 1.0), "_ClassAware"),
        ("Cascade", "Cascade", dict.fromkeys(ALL_TERMS, 1.0), "_ForegroundWeighted"),
        ("GeneralizedRCNN", "Cascade", dict.fromkeys(ALL_TERMS, 1.0), "_ForegroundWeighted"),
        ("RetinaNet", "GeneralizedRCNN", {"feat": 1.0, "ckd": 1.0}, None),
    ],
)
def test_presets_of_a_family(student, teacher, weights, mode):
    distiller = distiller_of(student, teacher)
    assert distiller.weights == weights
    regression = distiller.predictions.get("reg")
    assert (regression and type(regression.mode).__name__) == mode


def test_values_reach_the_modules():
    keys = {
        "CKD.QUEUE_SIZE": 480,
        "CKD.QUEUE_DTYPE": "float16",
        "CKD.DIM": 24,
        "CKD.PROJ": "mlp",
        "SGFI.KEY_DIM": 40,
        "SGFI.TAU_INIT": 2.0,
        "SGFI.STUDENT_LEVELS": "p3,p4",
    }
    distiller = distiller_of(**{f"KD.GDETKD.{k}": v for k, v in keys.items()})
    ckd, sgfi = distiller.ckd["0"], distiller.feature.sgfi
    assert ckd.queue.rows.shape == (480, 48) and str(ckd.queue.rows.dtype) == "torch.float16"
    assert ckd.projection[-1].out_features == 24 and len(ckd.projection) == 3
    assert sgfi.embed[0].out_channels == 40 and sgfi.num_levels == 2
    assert sgfi.log_tau.exp().item() == pytest.approx(2.0)
