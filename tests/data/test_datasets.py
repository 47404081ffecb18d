"""Registration, loading and checking of data sets."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from kd_d2.data import (
    check_datasets,
    dataset_classes,
    dataset_root,
    drop_unusable_annotations,
    register_all,
)
from kd_d2.data.datasets import BCCD_CLASSES, load_checked_coco_json

NAMES = (
    "digit_scenes_train bccd_trainval bccd_test coco_2017_train coco_2017_val voc_2007_trainval "
    "voc_2007_test voc_2012_trainval voc_0712_trainval bdd100k_train bdd100k_val"
).split()


def write_voc(root, year, ids):
    """A development kit with one 20x10 image and one dog per id, as both trainval and test."""
    folder = root / f"VOC{year}"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    for split in ("trainval", "test"):
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    for id_ in ids:
        Image.new("RGB", (20, 10)).save(folder / "JPEGImages" / f"{id_}.jpg")
        (folder / "Annotations" / f"{id_}.xml").write_text(
            "<annotation><size><width>20</width><height>10</height></size><object><name>dog</name>"
            "<difficult>0</difficult><bndbox><xmin>3</xmin><ymin>1</ymin><xmax>12</xmax>"
            "<ymax>10</ymax></bndbox></object></annotation>"
        )


def write_bccd(root):
    """The layout of BCCD with one image per split."""
    (root / "bccd" / "images").mkdir(parents=True)
    for id_, split in enumerate(("trainval", "test"), 1):
        Image.new("RGB", (64, 48)).save(root / "bccd" / "images" / f"{split}.jpg")
        content = {
            "info": {},
            "categories": [{"id": i + 1, "name": n} for i, n in enumerate(BCCD_CLASSES)],
            "images": [{"id": id_, "file_name": f"{split}.jpg", "width": 64, "height": 48}],
            "annotations": [
                {
                    "id": 1,
                    "image_id": id_,
                    "category_id": 3,
                    "bbox": [1, 2, 30, 20],
                    "area": 600,
                    "iscrowd": 0,
                }
            ],
        }
        (root / "bccd" / f"instances_{split}.json").write_text(json.dumps(content))


def bccd_roots(tmp_path):
    """A written copy of the layout, and the real data where this machine has them."""
    write_bccd(tmp_path)
    beside = os.path.join(os.path.dirname(__file__), "..", "..", "..", "shared", "data")
    found = [os.environ.get("DETECTRON2_DATASETS", ""), os.path.normpath(beside)]
    real = [f for f in found if os.path.isfile(os.path.join(f, "bccd", "instances_test.json"))]
    return [str(tmp_path)] + real


def test_import_registers_nothing_and_reads_nothing():
    code = (
        "import sys, kd_d2.data, kd_d2.evaluation\n"
        "from detectron2.data import DatasetCatalog\n"
        "assert 'bccd_test' not in DatasetCatalog and 'bdd100k_val' not in DatasetCatalog\n"
        "assert 'digit_scenes_train' not in DatasetCatalog and 'sklearn' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_root_is_the_argument_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "env"))
    assert dataset_root() == str(tmp_path / "env")
    assert dataset_root(str(tmp_path)) == str(tmp_path)
    register_all()
    root = str(tmp_path / "env")
    assert MetadataCatalog.get("coco_2017_val").json_file == os.path.join(
        root, "coco", "annotations", "instances_val2017.json"
    )
    assert MetadataCatalog.get("voc_2007_test").dirname == os.path.join(root, "VOC2007")
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert dataset_root() == "datasets"


def test_registering_again_changes_nothing_but_another_root_does(tmp_path):
    register_all(root=str(tmp_path))
    before = {name: DatasetCatalog.data[name] for name in NAMES}
    register_all(root=str(tmp_path))
    assert before == {name: DatasetCatalog.data[name] for name in NAMES}
    register_all(root=str(tmp_path / "other"))
    for name in NAMES:
        assert DatasetCatalog.data[name] is not before[name], name


def test_path_instead_of_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="root="):
        register_all(str(tmp_path))


def test_classes(tmp_path):
    register_all(root=str(tmp_path))
    coco = dataset_classes("coco_2017_train")
    assert len(coco) == 80 and coco[0] == "person" and coco[79] == "toothbrush"
    ids = MetadataCatalog.get("coco_2017_train").thing_dataset_id_to_contiguous_id
    assert len(ids) == 80 and ids[90] == 79
    assert dataset_classes("voc_0712_trainval")[14] == "person"
    assert len(dataset_classes("bdd100k_val")) == 10
    assert dataset_classes("bccd_test") == ["Platelets", "RBC", "WBC"]
    with pytest.raises(ValueError, match="bccd_tset.*bccd_test"):
        dataset_classes("bccd_tset")
    DatasetCatalog.register("classless", lambda: [])
    with pytest.raises(ValueError, match="classless has no class names"):
        dataset_classes("classless")


def test_bccd(tmp_path):
    for root in bccd_roots(tmp_path):
        register_all(root=root)
        sizes = []
        for name in ("bccd_trainval", "bccd_test"):
            dicts = DatasetCatalog.get(name)
            sizes.append(len(dicts))
            assert {a["category_id"] for d in dicts for a in d["annotations"]} <= {0, 1, 2}
            assert all(os.path.isfile(d["file_name"]) for d in dicts)
        if root == str(tmp_path):
            assert sizes == [1, 1]
            assert dicts[0]["annotations"][0]["bbox"] == [1, 2, 30, 20]
            assert dicts[0]["annotations"][0]["category_id"] == 2
        else:
            assert sizes == [292, 72]


def test_voc_and_its_union(tmp_path):
    write_voc(tmp_path, 2007, ["000001", "000002"])
    write_voc(tmp_path, 2012, ["2008_000001", "2008_000002", "2008_000003"])
    register_all(root=str(tmp_path))
    assert len(DatasetCatalog.get("voc_2007_test")) == 2
    union = DatasetCatalog.get("voc_0712_trainval")
    assert [d["image_id"] for d in union] == [
        "000001",
        "000002",
        "2008_000001",
        "2008_000002",
        "2008_000003",
    ]
    (annotation,) = union[4]["annotations"]
    assert annotation["category_id"] == 11  # dog
    assert annotation["bbox"] == [2, 0, 12, 10]  # 1-based inclusive -> 0-based, end exclusive
    path = tmp_path / "VOC2012" / "Annotations" / "2008_000002.xml"
    path.write_text(path.read_text().replace("dog", "wolf"))
    with pytest.raises(ValueError, match="trainval in .*VOC2012.*wolf|trainval in .*VOC2012"):
        DatasetCatalog.get("voc_0712_trainval")


@pytest.mark.parametrize(
    "name, place, help_",
    [
        ("bccd_test", "bccd/instances_test.json", "BCCD_Dataset"),
        ("coco_2017_val", "coco/annotations/instances_val2017.json", "cocodataset.org"),
        ("voc_2012_train", "VOC2012/ImageSets/Main/train.txt", "host.robots.ox.ac.uk"),
        ("bdd100k_val", "bdd100k/labels/det_20/det_val.json", "bdd-data.berkeley.edu"),
    ],
)
def test_missing_data_set_is_one_sentence(cfg, tmp_path, name, place, help_):
    register_all(root=str(tmp_path))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    for action in (lambda: check_datasets(cfg), lambda: DatasetCatalog.get(name)):
        with pytest.raises(FileNotFoundError) as caught:
            action()
        message = str(caught.value)
        assert name in message and str(tmp_path / place) in message and help_ in message
        assert "DETECTRON2_DATASETS" in message and "\n" not in message
        assert message.count(". ") == 0 and message.endswith(".")


def test_check_datasets(cfg, tmp_path, coco_folder):
    register_all(root=str(tmp_path))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("digit_scenes_train",), ("digit_scenes_val",)
    check_datasets(cfg)  # generated when needed, hence never missing
    cfg.DATASETS.TRAIN = ("bccd_trainval",)
    check_datasets(cfg, train=False)
    with pytest.raises(FileNotFoundError, match="bccd_trainval"):
        check_datasets(cfg)
    cfg.DATASETS.TRAIN = ()
    cfg.DATASETS.TEST = ("digit_scene_val",)
    with pytest.raises(ValueError, match="DATASETS.TEST .*'digit_scene_val'.*digit_scenes_val"):
        check_datasets(cfg)
    # A data set that someone else registered, with Detectron2's own function.
    from detectron2.data.datasets import register_coco_instances

    json_file, images = coco_folder([(20, 20, [])])
    register_coco_instances("theirs", {}, json_file, images)
    cfg.DATASETS.TEST = ("theirs",)
    check_datasets(cfg)
    os.remove(json_file)
    with pytest.raises(FileNotFoundError, match="theirs"):
        check_datasets(cfg)


def load_toy(json_file, images, classes=("a", "b")):
    MetadataCatalog.get("toy").set(thing_classes=list(classes))
    return load_checked_coco_json(json_file, images, "toy")


def test_coco_json_that_is_fine(coco_folder):
    dicts = load_toy(*coco_folder([(30, 20, [(2, 1, 2, 3, 4)]), (10, 10, [])]))
    assert [len(d["annotations"]) for d in dicts] == [1, 0]
    assert dicts[0]["annotations"][0]["category_id"] == 1


def test_category_that_is_not_listed(coco_folder):
    json_file, images = coco_folder([(30, 20, [(1, 1, 2, 3, 4), (7, 1, 2, 3, 4)])])
    with pytest.raises(ValueError) as caught:
        load_toy(json_file, images)
    message = str(caught.value)
    assert json_file in message and "annotation 2" in message and "category 7" in message
    assert "(1, 2)" in message and "\n" not in message


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda c: c.update(images=None), "no list 'images'"),
        (lambda c: c.update(images=[]), "lists no images, so the data set toy is empty"),
        (lambda c: c["annotations"][0].pop("bbox"), None),
        (lambda c: c["annotations"][0].pop("category_id"), "annotation 1 has no 'category_id'"),
        (lambda c: c["images"][0].pop("height"), "image 1 has no 'height'"),
        (
            lambda c: c["annotations"].append(dict(c["annotations"][0])),
            "annotation 1 is there twice",
        ),
        (lambda c: c.update(categories=[]), "no category"),
        (lambda c: c["categories"][0].update(name="z"), "has the classes z, b but .* a, b"),
    ],
)
def test_malformed_coco_json(coco_folder, spoil, words):
    json_file, images = coco_folder([(30, 20, [(1, 1, 2, 3, 4)])])
    content = json.load(open(json_file))
    spoil(content)
    with open(json_file, "w") as file:
        json.dump(content, file)
    if words is None:  # Detectron2 allows annotations without a box
        assert "bbox" not in load_toy(json_file, images)[0]["annotations"][0]
        return
    with pytest.raises(ValueError, match=words) as caught:
        load_toy(json_file, images)
    assert json_file in str(caught.value)


def test_incomplete_json_file(coco_folder):
    json_file, images = coco_folder([(30, 20, [(1, 1, 2, 3, 4)])])
    text = open(json_file).read()
    with open(json_file, "w") as file:
        file.write(text[: len(text) // 2])
    with pytest.raises(ValueError, match="instances.json is not a complete JSON file"):
        load_toy(json_file, images)


def test_unusable_boxes_are_dropped_and_counted(caplog):
    def box(*values, mode=BoxMode.XYWH_ABS):
        return {"bbox": list(values), "bbox_mode": mode, "category_id": 0}

    good = [
        box(0, 0, 1, 1),
        box(-5, -5, 6, 6),  # reaches one pixel into the image
        box(39, 29, 100, 100),
        box(1, 2, 3, 4, mode=BoxMode.XYXY_ABS),
    ]
    bad = [
        box(5, 5, 0, 3),
        box(5, 5, 3, -1),
        box(5, 5, 4, 9, mode=BoxMode.XYXY_ABS),
        box(float("nan"), 0, 1, 1),
        box(-5, 0, 5, 5),
        box(40, 0, 5, 5),
        box(0, 30, 5, 5),
        {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},
    ]
    first = {"file_name": "x.png", "width": 40, "height": 30, "annotations": bad + good}
    second = {"file_name": "y.png", "width": 40, "height": 30, "annotations": [bad[0]]}
    third = {"file_name": "z.png", "width": 40, "height": 30}
    with caplog.at_level("WARNING"):
        result = drop_unusable_annotations([first, second, third], "toy")
    assert result[0]["annotations"] == good
    assert result[1]["annotations"] == [] and result[2] is third
    assert len(first["annotations"]) == 12  # the argument is as before
    (record,) = caplog.records
    message = record.getMessage()
    assert (
        "1 missing, 1 not finite, 3 outside the image, 4 without area" in message
        and "x.png" in message
    )
    with pytest.raises(ValueError, match="None of the 1 boxes of toy is usable.*y.png"):
        drop_unusable_annotations([second], "toy")
    with pytest.raises(ValueError, match="no images in toy"):
        drop_unusable_annotations([], "toy")


def test_image_pixels_are_not_read_when_loading(tmp_path):
    write_bccd(tmp_path)
    os.remove(tmp_path / "bccd" / "images" / "test.jpg")
    register_all(root=str(tmp_path))
    assert np.prod([DatasetCatalog.get("bccd_test")[0][k] for k in ("width", "height")]) == 3072
