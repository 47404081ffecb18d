"""Which boxes become crops, why others do not, and that the stored index is the current one."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from kd_d2.projects.dicod import crop_index
from kd_d2.projects.dicod.crop_index import (
    CropIndex,
    build_crop_index,
    load_crop_index,
    load_crop_indices,
    why_dropped,
)
from tests.projects.dicod.crop_cases import CLASSES, annotation, coco_dataset

ROOT = Path(__file__).parents[3]

# the image is 120 wide and 90 high
KEPT = [
    annotation([10, 20, 30, 40], 2),
    annotation([0.13, 3, 1.0, 5.5], 1),  # 0.13 + 1 - 0.13 < 1 in floating point
    annotation([-20, -10, 20.5, 10.5], 3),  # half a pixel inside
    annotation([119.5, 89.5, 50, 50], 2),
    annotation([5, 6, 7.25, 8.125], 2, area=0.5),  # the area is that of a mask
]
DROPPED = [
    ("crowd", annotation([1, 1, 20, 20], iscrowd=1)),
    ("ignored", annotation([1, 1, 20, 20], ignore=1)),
    ("no area", annotation([1, 1, 20, 20], area=0)),
    ("no area", annotation([1, 1, 20, 0])),
    ("a side below 1 pixel", annotation([1, 1, 0.99, 20])),
    ("a side below 1 pixel", annotation([1, 1, 20, 0.5])),
    ("outside the image", annotation([-20, 5, 20, 20])),  # touches the border
    ("outside the image", annotation([120, 5, 20, 20])),
    ("outside the image", annotation([5, 90, 20, 20])),
    ("unknown category", annotation([1, 1, 20, 20], 77)),
    ("no valid box", annotation([1, 1, float("nan"), 20])),
    ("of an image that is not listed", annotation([1, 1, 20, 20], image_id=9)),
]


@pytest.fixture
def loaded(monkeypatch):
    """Detectron2's loader refuses "ignore" and unknown categories; classes come from elsewhere."""

    def register(name):
        MetadataCatalog.get(name).set(
            thing_classes=list(CLASSES), thing_dataset_id_to_contiguous_id={1: 0, 2: 1, 3: 2}
        )

    return register


def test_entries_reproduce_their_source(tmp_path, loaded):
    annotations = [a for pair in zip((a for _, a in DROPPED), KEPT * 3) for a in pair]
    with coco_dataset(tmp_path, annotations, sizes=[(90, 120), (30, 40)]) as name:
        loaded(name)
        index = build_crop_index(name, progress=False)
        folder = MetadataCatalog.get(name).image_root
    sources = [a for a in annotations if a in KEPT]
    assert len(index) == len(sources) == 12
    for i, source in enumerate(sources):
        record = index.record(i)
        x, y, w, h = source["bbox"]
        assert record["box"].tolist() == [x, y, x + w, y + h]
        assert record["label"] == source["category_id"] - 1
        assert record["file_name"] == os.path.join(folder, "0.png")
        assert (record["height"], record["width"]) == (90, 120)
    assert index.counts() == {"disc": 3, "square": 7, "cross": 2}
    assert index.classes == tuple(CLASSES) and len(index.file_names) == 2


@pytest.mark.parametrize("reason, bad", DROPPED)
def test_reasons(tmp_path, loaded, reason, bad):
    with coco_dataset(tmp_path, [bad, KEPT[0]]) as name:
        loaded(name)
        index = build_crop_index(name, progress=False)
    assert index.dropped == {reason: 1} and len(index) == 1
    assert f"dropped         1  {reason}" in index.report()
    assert "crops           1  square" in index.report()


def test_an_unknown_area_is_that_of_the_box():
    assert why_dropped({"bbox": [0, 0, 5, 5], "label": 0}, 9, 9) is None
    assert why_dropped({"bbox": [5, 0, 0, 5], "label": 0}, 9, 9) == "no area"


def test_any_registered_data_set(tmp_path):
    """VOC, BDD100K, users' functions: what the loader returns, in either box mode."""
    name = "crops_from_dictionaries"
    boxes = [([1, 2, 30, 40], BoxMode.XYWH_ABS, 2), ([1, 2, 31.5, 42], BoxMode.XYXY_ABS, 0)]
    annotations = [{"bbox": b, "bbox_mode": m, "category_id": c} for b, m, c in boxes]
    annotations.append({**annotations[0], "iscrowd": 1})
    annotations.append({**annotations[0], "category_id": 3})
    images = [
        {"file_name": "a.png", "height": 50, "width": 60},
        {"file_name": "b.png", "height": 50, "width": 60, "annotations": annotations},
    ]
    DatasetCatalog.register(name, lambda: images)
    MetadataCatalog.get(name).thing_classes = list(CLASSES)
    try:
        index = load_crop_index(name, str(tmp_path), progress=False)
        images[1]["annotations"][0]["bbox"] = [2, 2, 30, 40]
        changed = load_crop_index(name, str(tmp_path), progress=False)
        images[0]["width"] = None
        with pytest.raises(ValueError, match="a.png .* no width or height"):
            build_crop_index(name, progress=False)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert index.boxes.tolist() == [[1, 2, 31, 42], [1, 2, 31.5, 42]]
    assert index.labels.tolist() == [2, 0] and index.image_index.tolist() == [1, 1]
    assert index.record(0)["file_name"] == "b.png"
    assert index.dropped == {"crowd": 1, "unknown category": 1}
    assert changed.boxes[0].tolist() == [2, 2, 32, 42]


def test_the_index_is_stored_and_built_again_when_stale(tmp_path, monkeypatch):
    builds = []
    build = crop_index._build

    def counted(*args):
        builds.append(args[0])
        return build(*args)

    monkeypatch.setattr(crop_index, "_build", counted)
    folder = tmp_path / "index"
    with coco_dataset(tmp_path, KEPT) as name:
        first = load_crop_index(name, str(folder), progress=False)
        second = load_crop_index(name, str(folder), progress=False)
        assert builds == [name] and os.listdir(folder) == [f"{name}.npz"]
        for key in ("file_names", "image_sizes", "image_index", "boxes", "labels"):
            ours, theirs = getattr(second, key), getattr(first, key)
            assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype, key
        for key in ("name", "classes", "dropped", "fingerprint"):
            assert getattr(second, key) == getattr(first, key), key

        json_file = Path(MetadataCatalog.get(name).json_file)
        content = json.loads(json_file.read_text())
        content["annotations"][0]["bbox"][0] = 11
        json_file.write_text(json.dumps(content))
        third = load_crop_index(name, str(folder), progress=False)
        assert len(builds) == 2 and third.boxes[0, 0] == 11

        (folder / f"{name}.npz").write_bytes(b"damaged")
        with pytest.raises(ValueError, match="no crop index"):
            CropIndex.read(str(folder / f"{name}.npz"))
        assert len(load_crop_index(name, str(folder), progress=False)) == 5
        assert len(builds) == 3

        blocked = tmp_path / "file"
        blocked.write_text("")
        with pytest.raises(ValueError, match="CROP_CLASSIFIER.INDEX_DIR"):
            load_crop_index(name, str(blocked / "below"), progress=False)


def test_refusals(tmp_path, loaded):
    with coco_dataset(tmp_path, [DROPPED[0][1]]) as empty:
        loaded(empty)
        with pytest.raises(ValueError, match="no box to crop .1 crowd"):
            build_crop_index(empty, progress=False)
    with coco_dataset(tmp_path, KEPT) as one, coco_dataset(tmp_path, KEPT, CLASSES[::-1]) as two:
        with pytest.raises(ValueError, match="different classes"):
            load_crop_indices([one, two], str(tmp_path / "index"))
    with pytest.raises(ValueError, match="is empty"):
        load_crop_indices([])
    with pytest.raises(ValueError, match="unknown name"):
        build_crop_index("no_such_data_set")


def test_the_command_prints_the_counts(tmp_path, capsys):
    path = ROOT / "projects/DICOD/tools/crop_index.py"
    spec = importlib.util.spec_from_file_location("crop_index_tool", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    crowd = annotation([1, 1, 20, 20], iscrowd=1)
    with coco_dataset(tmp_path, [*KEPT, crowd]) as name:
        folders = ["--index-dir", str(tmp_path / "i"), "--write-crops", str(tmp_path / "c")]
        tool.main(["--dataset", name, *folders])
    printed = capsys.readouterr().out
    assert f"{name}: 5 crops from 1 images" in printed
    assert "dropped         1  crowd" in printed and "crops           3  square" in printed
    assert len(list((tmp_path / "c" / name).rglob("*.png"))) == 5
    assert (tmp_path / "i" / f"{name}.npz").is_file()
    with pytest.raises(SystemExit, match="nearest known"):
        tool.main(["--dataset", "no_such_data_set"])
