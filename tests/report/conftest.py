"""Real runs of a few iterations, shared by the tests of the report."""

import pytest

from kd_d2.engine.experiment import train_once
from tests.engine.support import teacher_keys
from tests.fixtures import registered_toy_dataset, tiny_cfg

# what names of classes must never do on a page
EVIL = "<img src=x onerror=alert(1)>"
TOY_CLASSES = (EVIL, "b & c", "plain")
_TRAINED = {
    "MODEL.GFL.NUM_CLASSES": len(TOY_CLASSES),
    "SOLVER.MAX_ITER": 20,
    "SOLVER.BASE_LR": 0.01,
    "TEST.EVAL_PERIOD": 10,
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(folder of a plain run, folder of one taught with PKD and analysed with TIDE)."""
    root = tmp_path_factory.mktemp("runs")
    with registered_toy_dataset(root, 6, TOY_CLASSES) as name:
        data = {"DATASETS.TRAIN": (name,), "DATASETS.TEST": (name,)}
        plain = tiny_cfg("GFL", **_TRAINED, **data, OUTPUT_DIR=str(root / "plain"))
        train_once(plain, "plain")
        own = {"MODEL.GFL.NUM_CLASSES": len(TOY_CLASSES)}
        distilled = {
            **teacher_keys(root / "teacher", "GFL", classes=TOY_CLASSES, **own),
            "KD.ENABLED": True,
            "KD.DISTILLERS": ("PKD",),
            "KD.GRAD_RATIO_PERIOD": 10,
            "KD.EVAL_TEACHER": "sample",
            "TEST.TIDE.ENABLED": True,
            "OUTPUT_DIR": str(root / "pkd <i>"),
        }
        train_once(tiny_cfg("GFL", **_TRAINED, **data, **distilled), "pkd")
        yield root / "plain", root / "pkd <i>"
