"""Evaluators give the full score to the ground truth, and know every registered kind."""

import json
import os
import time

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from kd_d2.config import get_cfg
from kd_d2.data import build_sample_loader, register_all
from kd_d2.evaluation import (
    EVALUATOR_BUILDERS,
    PascalVOCEvaluator,
    SampledPascalVOCEvaluator,
    SubsetEvaluator,
    build_evaluator,
    build_sample_evaluator,
)


@pytest.fixture(autouse=True)
def restored_catalogs():
    """Undo what a test registers."""
    datasets, metadata = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    DatasetCatalog.data.clear()
    DatasetCatalog.data.update(datasets)
    MetadataCatalog.data.clear()
    MetadataCatalog.data.update(metadata)


@pytest.fixture
def cfg(tmp_path):
    """Small digit-scenes, registered below a temporary folder."""
    config = get_cfg()
    config.OUTPUT_DIR = str(tmp_path / "output")
    config.DATALOADER.NUM_WORKERS = 0
    config.DATASETS.DIGIT_SCENES.NUM_TRAIN = 1
    config.DATASETS.DIGIT_SCENES.NUM_VAL = 8
    register_all(config, str(tmp_path))
    return config


def ground_truth(record, shift=0.0, score=0.9):
    """The annotations of a data set's image as detections, moved to the right by ``shift``."""
    boxes = [
        BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in record["annotations"]
    ]
    found = Instances((record["height"], record["width"]))
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    found.pred_boxes = Boxes(tensor + torch.tensor([shift, 0, shift, 0]))
    found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]]).long()
    found.scores = torch.full((len(boxes),), score)
    return {"instances": found}


def evaluate(evaluator, records, outputs):
    evaluator.reset()
    for record, output in zip(records, outputs):
        evaluator.process([record], [output])
    return evaluator.evaluate()["bbox"]


def test_ground_truth_of_digit_scenes_has_ap_100(cfg, tmp_path):
    # The evaluator comes first, as after --eval-only: it generates the data set.
    evaluator = build_evaluator(cfg, "digit_scenes_val")
    assert isinstance(evaluator, COCOEvaluator)
    records = DatasetCatalog.get("digit_scenes_val")
    result = evaluate(evaluator, records, [ground_truth(r) for r in records])
    assert result["AP"] == result["AP50"] == result["AP75"] == pytest.approx(100)
    present = {a["category_id"] for r in records for a in r["annotations"]}
    for digit in present:
        assert result[f"AP-{digit}"] == pytest.approx(100)
    assert (tmp_path / "output" / "inference" / "coco_instances_results.json").is_file()


def test_moved_boxes_lose_the_strict_thresholds(cfg):
    # One box of width w moved by w/4 has IoU (3/4) / (5/4) = 0.6: right for 0.5, 0.55 and,
    # at w divisible by 4 exactly, 0.6; never for 0.65 and beyond.
    records = DatasetCatalog.get("digit_scenes_val")
    outputs = []
    for record in records:
        output = ground_truth(record)
        boxes = output["instances"].pred_boxes.tensor
        boxes[:, 0::2] += ((boxes[:, 2] - boxes[:, 0]) * 0.24)[:, None]
        outputs.append(output)
    result = evaluate(build_evaluator(cfg, "digit_scenes_val"), records, outputs)
    # Boxes of the same class that overlap could cost something; none does here.
    assert result["AP50"] == pytest.approx(100)
    assert result["AP75"] == pytest.approx(0)
    assert result["AP"] == pytest.approx(30)  # 0.5, 0.55 and 0.6 of ten thresholds


def test_sample_is_judged_by_its_own_images(cfg):
    records = DatasetCatalog.get("digit_scenes_val")
    loader = build_sample_loader(cfg, "digit_scenes_val", 4)
    ids = [item["image_id"] for batch in loader for item in batch]
    assert ids == [2, 4, 6, 8]  # ids begin with 1
    sample = [r for r in records if r["image_id"] in ids]
    outputs = [ground_truth(r) for r in sample]
    evaluator = build_sample_evaluator(cfg, "digit_scenes_val")
    assert isinstance(evaluator, SubsetEvaluator)
    assert evaluate(evaluator, sample, outputs)["AP"] == pytest.approx(100)
    # The whole data set has digits that were not looked at.
    assert evaluate(build_evaluator(cfg, "digit_scenes_val"), sample, outputs)["AP"] < 90
    # A second use begins anew: images of the first do not count.
    assert evaluate(evaluator, sample[:1], outputs[:1])["AP"] == pytest.approx(100)


def test_images_without_detections_count_as_missed(cfg):
    records = [r for r in DatasetCatalog.get("digit_scenes_val") if r["annotations"]][:2]
    nothing = ground_truth(dict(records[1], annotations=[]))
    evaluator = build_sample_evaluator(cfg, "digit_scenes_val")
    both = evaluate(evaluator, records, [ground_truth(r) for r in records])
    half = evaluate(evaluator, records, [ground_truth(records[0]), nothing])
    assert both["AP"] == pytest.approx(100) and half["AP"] < 95


def write_voc(root):
    folder = root / "VOC2007"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    ids = [f"00000{i}" for i in range(1, 5)]
    (folder / "ImageSets" / "Main" / "test.txt").write_text("\n".join(ids) + "\n")
    for i, id_ in enumerate(ids):
        Image.new("RGB", (60, 50)).save(folder / "JPEGImages" / f"{id_}.jpg")
        objects = "".join(
            f"<object><name>{name}</name><pose/><truncated>0</truncated><difficult>0</difficult>"
            f"<bndbox><xmin>{5 + i}</xmin><ymin>6</ymin><xmax>{30 + i}</xmax><ymax>{y}</ymax>"
            "</bndbox></object>"
            for name, y in (("dog", 30), ("cat", 40))
        )
        (folder / "Annotations" / f"{id_}.xml").write_text(
            f"<annotation><size><width>60</width><height>50</height></size>{objects}</annotation>"
        )


def test_pascal_voc(cfg, tmp_path):
    write_voc(tmp_path)
    records = DatasetCatalog.get("voc_2007_test")
    outputs = [ground_truth(r) for r in records]
    # Mean over 20 classes of which two occur.
    full = evaluate(build_evaluator(cfg, "voc_2007_test"), records, outputs)
    assert full["AP"] == full["AP50"] == pytest.approx(100 * 2 / 20)
    half = evaluate(build_evaluator(cfg, "voc_2007_test"), records[:2], outputs[:2])
    # Recall 1/2 at precision 1: 6 of the 11 points of the 2007 metric.
    assert half["AP50"] == pytest.approx(100 * 2 / 20 * 6 / 11)
    sampled = build_sample_evaluator(cfg, "voc_2007_test")
    assert isinstance(sampled, SampledPascalVOCEvaluator)
    for count in (2, 1, 4):
        result = evaluate(sampled, records[:count], outputs[:count])
        assert result["AP50"] == pytest.approx(100 * 2 / 20)


def test_pascal_voc_thresholds(cfg, tmp_path):
    write_voc(tmp_path)
    records = DatasetCatalog.get("voc_2007_test")
    outputs = []
    # dogs are 26 pixels wide: shifted by w they have IoU (26 - w) / (26 + w)
    for record, shift in zip(records, (1, 2, 4, 6)):  # 0.926, 0.857, 0.733, 0.625
        output = ground_truth(record)
        dogs = output["instances"].pred_classes == 11
        output["instances"] = output["instances"][dogs]
        output["instances"].pred_boxes.tensor[:, 0::2] += shift
        output["instances"].scores -= 0.1 * shift  # worse ones come later
        outputs.append(output)
    evaluator = build_evaluator(cfg, "voc_2007_test")
    assert type(evaluator) is PascalVOCEvaluator
    result = evaluate(evaluator, records, outputs)
    # 11 points of recall at precision 1: 11, 8, 6 and 3 of them for 4, 3, 2 and 1 dogs
    expected = {"AP50": 11, "AP70": 8, "AP75": 6, "AP90": 3}
    for name, points in expected.items():
        assert result[name] == pytest.approx(100 / 20 * points / 11), name
    assert list(result) == ["AP", "AP50", "AP70", "AP75", "AP90"]
    # three thresholds with all four, two with three, 0.75 to 0.85 with two, 0.9 with one
    assert result["AP"] == pytest.approx(100 / 20 * (3 * 11 + 2 * 8 + 3 * 6 + 3) / 11 / 10)
    theirs = evaluate(PascalVOCDetectionEvaluator("voc_2007_test"), records, outputs)
    for name, value in theirs.items():
        assert result[name] == pytest.approx(value)
    sampled = evaluate(build_sample_evaluator(cfg, "voc_2007_test"), records[:2], outputs[:2])
    assert sampled["AP70"] == pytest.approx(100 / 20)
    assert sampled["AP90"] == pytest.approx(100 / 20 * 6 / 11)


def test_bdd100k_is_converted(cfg, tmp_path):
    labels = tmp_path / "bdd100k" / "labels" / "det_20"
    labels.mkdir(parents=True)
    (tmp_path / "bdd100k" / "images" / "100k" / "val").mkdir(parents=True)
    box = {"x1": 10, "y1": 20, "x2": 109, "y2": 79}
    frames = [
        {"name": "a.jpg", "labels": [{"category": "car", "box2d": box}]},
        {"name": "b.jpg", "labels": [{"category": "bus", "box2d": box}]},
    ]
    (labels / "det_val.json").write_text(json.dumps(frames))
    records = DatasetCatalog.get("bdd100k_val")
    outputs = [ground_truth(r) for r in records]
    evaluator = build_evaluator(cfg, "bdd100k_val")
    assert evaluate(evaluator, records, outputs)["AP"] == pytest.approx(100)
    sampled = build_sample_evaluator(cfg, "bdd100k_val")
    assert evaluate(sampled, records[1:], outputs[1:])["AP"] == pytest.approx(100)
    register_all(cfg, str(tmp_path))  # the converted file does not count as a change
    assert "json_file" in MetadataCatalog.get("bdd100k_val").as_dict()


def test_missing_annotations_are_explained(cfg):
    with pytest.raises(FileNotFoundError, match="bccd_test was looked for in"):
        build_evaluator(cfg, "bccd_test")


def test_cache_of_bdd100k_follows_its_label_file(cfg, tmp_path):
    labels = tmp_path / "bdd100k" / "labels" / "det_20"
    labels.mkdir(parents=True)
    (tmp_path / "bdd100k" / "images" / "100k" / "val").mkdir(parents=True)
    box = {"x1": 10, "y1": 20, "x2": 109, "y2": 79}
    file = labels / "det_val.json"
    for age, number in ((20, 1), (10, 2)):
        label = {"category": "bike", "box2d": box}
        frames = [{"name": "a.jpg", "labels": [label] * number}, {"name": "b.jpg"}]
        file.write_text(json.dumps(frames))
        os.utime(file, (time.time() + 1000 - age,) * 2)
        # as a new process would see it
        MetadataCatalog.get("bdd100k_val").__dict__.pop("json_file", None)
        build_evaluator(cfg, "bdd100k_val")
        (cache,) = (tmp_path / "output" / "inference").glob("*.json")
        os.utime(cache, (time.time() + 985,) * 2)
        content = json.loads(cache.read_text())
        assert len(content["images"]) == 2 and len(content["annotations"]) == number
    assert content["annotations"][0]["bbox"] == [10, 20, 100, 60]
    # an up-to-date one is taken as it is
    cache.write_text(json.dumps({**content, "annotations": []}))
    os.utime(cache, (time.time() + 2000,) * 2)
    MetadataCatalog.get("bdd100k_val").__dict__.pop("json_file", None)
    build_evaluator(cfg, "bdd100k_val")
    assert json.loads(cache.read_text())["annotations"] == []


@pytest.mark.parametrize("build", [build_evaluator, build_sample_evaluator])
def test_unknown_kind_is_named_with_the_known_ones(cfg, build):
    DatasetCatalog.register("strange", lambda: [])
    MetadataCatalog.get("strange").set(evaluator_type="guess")
    with pytest.raises(ValueError, match="strange .*'guess'.*'coco', 'pascal_voc'"):
        build(cfg, "strange")
    with pytest.raises(ValueError, match="voc_0712_trainval .*None"):
        build(cfg, "voc_0712_trainval")


def test_new_kind_is_one_registry_entry(cfg):
    class Constant(DatasetEvaluator):
        pass

    def constant(cfg, dataset_name, output_folder, sampled):
        return Constant()

    MetadataCatalog.get("strange").set(evaluator_type="constant")
    EVALUATOR_BUILDERS.register(constant)
    try:
        assert isinstance(build_evaluator(cfg, "strange"), Constant)
    finally:
        EVALUATOR_BUILDERS._obj_map.pop("constant")
