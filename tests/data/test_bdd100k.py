"""The label files of BDD100K."""

import json

import pytest
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from kd_d2.data import register_all
from kd_d2.data.bdd100k import BDD100K_CLASSES, load_bdd100k_json

FRAMES = [
    {
        "name": "b1.jpg",
        "labels": [
            {"category": "car", "box2d": {"x1": 10.5, "y1": 20, "x2": 109.5, "y2": 69}},
            {"category": "other vehicle", "box2d": {"x1": 0, "y1": 0, "x2": 5, "y2": 5}},
            {"category": "trailer", "box2d": {"x1": 0, "y1": 0, "x2": 5, "y2": 5}},
            {"category": "trailer", "box2d": {"x1": 0, "y1": 0, "x2": 5, "y2": 5}},
            {
                "category": "pedestrian",
                "attributes": {"crowd": True},
                "box2d": {"x1": 1, "y1": 2, "x2": 3, "y2": 4},
            },
            {"category": "traffic sign", "poly2d": []},
        ],
    },
    {"name": "b2.jpg", "labels": None},
    {"name": "b3.jpg"},
]


@pytest.mark.parametrize("content", [FRAMES, {"frames": FRAMES, "config": {}}])
def test_frames_and_left_out_categories(tmp_path, caplog, content):
    path = tmp_path / "det_val.json"
    path.write_text(json.dumps(content))
    with caplog.at_level("INFO", logger="kd_d2"):
        dicts = load_bdd100k_json(str(path), "images")
    assert [d["image_id"] for d in dicts] == ["b1", "b2", "b3"]
    assert dicts[0]["file_name"] == "images/b1.jpg"
    assert (dicts[0]["height"], dicts[0]["width"]) == (720, 1280)
    car, pedestrian = dicts[0]["annotations"]
    assert BDD100K_CLASSES[car["category_id"]] == "car" and car["iscrowd"] == 0
    assert car["bbox"] == [10.5, 20, 110.5, 70] and car["bbox_mode"] == BoxMode.XYXY_ABS
    assert pedestrian["category_id"] == 0 and pedestrian["iscrowd"] == 1
    assert dicts[1]["annotations"] == dicts[2]["annotations"] == []
    (record,) = caplog.records
    assert "1 of 'other vehicle', 1 of 'traffic sign', 2 of 'trailer'" in record.getMessage()


def test_registered_layout(tmp_path):
    labels = tmp_path / "bdd100k" / "labels" / "det_20"
    labels.mkdir(parents=True)
    (tmp_path / "bdd100k" / "images" / "100k" / "train").mkdir(parents=True)
    (labels / "det_train.json").write_text(json.dumps(FRAMES))
    register_all(root=str(tmp_path))
    dicts = DatasetCatalog.get("bdd100k_train")
    assert len(dicts) == 3
    assert dicts[2]["file_name"] == str(tmp_path / "bdd100k/images/100k/train/b3.jpg")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"images": []}')
    with pytest.raises(ValueError, match="labels.json is not a label file of BDD100K"):
        load_bdd100k_json(str(path), "")
    path.write_text("[")
    with pytest.raises(ValueError, match="labels.json is not a JSON file"):
        load_bdd100k_json(str(path), "")


def test_labels_of_2018(tmp_path):
    box = {"x1": 1, "y1": 2, "x2": 3, "y2": 4}
    names = ("person", "motor", "bike", "drivable area", "lane")
    labels = [{"category": name, "box2d": box} for name in names[:3]]
    labels += [{"category": name, "poly2d": []} for name in names[3:]]
    path = tmp_path / "bdd100k_labels_images_val.json"
    path.write_text(json.dumps([{"name": "a.jpg", "labels": labels}]))
    (record,) = load_bdd100k_json(str(path), "")
    found = [BDD100K_CLASSES[a["category_id"]] for a in record["annotations"]]
    assert found == ["pedestrian", "motorcycle", "bicycle"]
    # a class that is asked for by that name is no alias
    (record,) = load_bdd100k_json(str(path), "", ("bike", "person", "pedestrian"))
    assert [a["category_id"] for a in record["annotations"]] == [1, 0]


def test_broken_frame_is_named(tmp_path):
    path = tmp_path / "det_val.json"
    path.write_text(json.dumps([*FRAMES, {"name": "d.jpg", "labels": [{"box2d": {}}]}]))
    with pytest.raises(ValueError, match="det_val.json: frame 3 is not as .*KeyError: 'category'"):
        load_bdd100k_json(str(path), "")
