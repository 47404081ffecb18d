"""Error types beside AP, from the evaluator that a config asks for."""

import json
import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, print_csv_format
from detectron2.structures import Boxes, BoxMode, Instances

from kd_d2.config import get_cfg
from kd_d2.data import register_all
from kd_d2.evaluation import (
    SubsetEvaluator,
    TideEvaluator,
    build_evaluator,
    build_sample_evaluator,
    tide_errors,
)
from kd_d2.evaluation.tide import COCO_THRESHOLDS, ERROR_TYPES
from tests.engine.support import train
from tests.fixtures import CLASSES, registered_toy_dataset, tiny_cfg


@pytest.fixture(autouse=True)
def nothing_left_registered(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


@pytest.fixture
def toy(tmp_path):
    with registered_toy_dataset(tmp_path, 4, size=(64, 64), boxes_per_image=3) as name:
        yield name


@pytest.fixture
def cfg(tmp_path):
    config = get_cfg()
    config.OUTPUT_DIR = str(tmp_path / "output")
    config.TEST.TIDE.ENABLED = True
    return config


def detections(record, turn=0, keep=slice(None)):
    """The annotations as detections, classes moved on by ``turn``."""
    annotations = record["annotations"][keep]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    found = Instances((record["height"], record["width"]))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    classes = [(a["category_id"] + turn) % len(CLASSES) for a in annotations]
    found.pred_classes = torch.tensor(classes).long()
    found.scores = torch.linspace(0.9, 0.8, len(annotations))
    return {"instances": found}


def evaluate(evaluator, records, outputs):
    evaluator.reset()
    for record, output in zip(records, outputs):
        evaluator.process([record], [output])
    return evaluator.evaluate()


def test_off_by_default(tmp_path, toy):
    config = get_cfg()
    config.OUTPUT_DIR = str(tmp_path)
    assert type(build_evaluator(config, toy)) is COCOEvaluator
    assert config.TEST.TIDE.THRESHOLDS == pytest.approx(COCO_THRESHOLDS)


def test_errors_stand_beside_ap(cfg, toy, tmp_path, caplog):
    records = DatasetCatalog.get(toy)
    outputs = [detections(r, turn=1 if i == 0 else 0) for i, r in enumerate(records)]
    evaluator = build_evaluator(cfg, toy)
    assert isinstance(evaluator, TideEvaluator)
    result = evaluate(evaluator, records, outputs)
    tide = result["tide"]
    # three of twelve objects have the wrong class, and nothing else is wrong
    assert tide["Cls"] == pytest.approx(100 - result["bbox"]["AP"]) and tide["Cls"] > 20
    assert tide["Cls-50"] == pytest.approx(tide["Cls-95"]) == pytest.approx(tide["Cls"])
    assert [tide[name] for name in ("Loc", "Both", "Dupe", "Bkg")] == [0] * 4
    assert len(tide) == len(ERROR_TYPES) * 11
    folder = tmp_path / "output" / "inference"
    written = json.loads((folder / "coco_tide.json").read_text())
    assert written["counts"]["Cls"] == [3] * 10
    gt = json.loads(open(MetadataCatalog.get(toy).json_file).read())
    predictions = json.loads((folder / "coco_instances_results.json").read_text())
    assert tide_errors(gt, predictions, cfg.TEST.TIDE.THRESHOLDS).metrics() == tide
    # Detectron2's summary shows the six means, not the values at each threshold
    with caplog.at_level(logging.INFO):
        print_csv_format(result)
    assert "copypaste: Cls,Loc,Both,Dupe,Bkg,Miss" in caplog.text


def test_sample_is_judged_by_its_own_images(cfg, toy):
    records = DatasetCatalog.get(toy)[1:3]
    evaluator = build_sample_evaluator(cfg, toy)
    assert isinstance(evaluator, SubsetEvaluator)
    result = evaluate(evaluator, records, [detections(r) for r in records])
    assert result["bbox"]["AP"] == pytest.approx(100) and result["tide"]["Miss"] == 0
    # over the whole data set the objects of the other two images are missed
    result = evaluate(build_evaluator(cfg, toy), records, [detections(r) for r in records])
    assert result["tide"]["Miss"] == pytest.approx(100 - result["bbox"]["AP"])
    assert result["tide"]["Miss"] > 30


def test_thresholds_of_the_config(cfg, toy):
    cfg.TEST.TIDE.THRESHOLDS = (0.3, 0.75)
    records = DatasetCatalog.get(toy)
    tide = evaluate(build_evaluator(cfg, toy), records, [detections(r) for r in records])["tide"]
    assert set(tide) == {f"{n}{end}" for n in ERROR_TYPES for end in ("", "-30", "-75")}
    cfg.TEST.TIDE.THRESHOLDS = (0.75, 0.3)
    with pytest.raises(ValueError, match="TEST.TIDE.THRESHOLDS must be ascending"):
        build_evaluator(cfg, toy)


def test_no_prediction_at_all(cfg, toy, caplog):
    records = DatasetCatalog.get(toy)
    empty = [detections(r, keep=slice(0)) for r in records]
    assert set(evaluate(build_evaluator(cfg, toy), records, empty)) == {"bbox"}
    assert "no error types (TEST.TIDE): there is no prediction" in caplog.text
    # and no file of an earlier evaluation is read if this one saw nothing
    evaluator = build_evaluator(cfg, toy)
    evaluate(evaluator, records, [detections(r) for r in records])
    assert evaluate(evaluator, [], []) == {}


def test_data_set_that_is_no_json_file(cfg, toy):
    records = DatasetCatalog.get(toy)
    DatasetCatalog.register("toy_of_dicts", lambda: records)
    MetadataCatalog.get("toy_of_dicts").set(evaluator_type="coco", thing_classes=list(CLASSES))
    outputs = [detections(r) for r in records]
    result = evaluate(build_evaluator(cfg, "toy_of_dicts"), records, outputs)
    assert result["bbox"]["AP"] == pytest.approx(100)
    assert all(value == 0 for value in result["tide"].values())


def test_voc_has_no_error_types(cfg, tmp_path):
    register_all(cfg, str(tmp_path))
    with pytest.raises(ValueError, match="TEST.TIDE.ENABLED is True, but voc_2007_test"):
        build_evaluator(cfg, "voc_2007_test")


def test_training_logs_error_types(toy, tmp_path):
    keys = {
        "DATASETS.TRAIN": (toy,),
        "DATASETS.TEST": (toy,),
        "OUTPUT_DIR": str(tmp_path / "output"),
        "SOLVER.MAX_ITER": 1,
        "TEST.TIDE.ENABLED": True,
        "TEST.TIDE.THRESHOLDS": (0.2,),
        "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    }
    train(tiny_cfg("RetinaNet", **keys))
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    logged = {key: value for line in lines for key, value in json.loads(line).items()}
    assert "bbox/AP" in logged and {f"tide/{n}" for n in ERROR_TYPES} <= set(logged)
    assert logged["tide/Bkg"] == logged["tide/Bkg-20"]
