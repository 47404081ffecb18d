"""Data sets with their files, and what is registered."""

import os

from kd_d2.data import register_all
from kd_d2.doctor.inventory import datasets_text, list_components, list_datasets
from kd_d2.engine.main import import_components


def test_files_of_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "bccd" / "images").mkdir(parents=True)
    (tmp_path / "bccd" / "instances_test.json").touch()
    register_all()
    try:
        found = {x.name: x for x in list_datasets()}
        text = "\n".join(datasets_text(list(found.values())))
    finally:
        monkeypatch.undo()
        register_all()
    assert found["bccd_test"].missing == 0
    # the images are there, the annotations are not
    assert found["bccd_trainval"].missing == 1
    assert found["bccd_trainval"].path == str(tmp_path / "bccd" / "instances_trainval.json")
    assert found["coco_2017_val"].missing == 2
    assert found["digit_scenes_val"].generated and not found["digit_scenes_val"].missing
    assert "cityscapes" not in text  # Detectron2's own
    assert f"data sets below {tmp_path} (DETECTRON2_DATASETS is set)" in text
    (line,) = [x for x in text.splitlines() if x.startswith("  to get bccd")]
    assert line.startswith("  to get bccd_trainval: take the images of")
    (line,) = [x for x in text.splitlines() if x.startswith("  bccd_test")]
    assert line.split()[1:] == ["found", str(tmp_path / "bccd" / "instances_test.json")]
    assert os.listdir(tmp_path) == ["bccd"]  # only looked at


def test_components():
    import_components()
    found = list_components()
    assert {"CrossKD", "GDetKD", "DICOD", "PKD"} <= set(found["methods"])
    assert {"DetectorTeacher", "ClassifierTeacher", "ElasticTeacher"} <= set(found["teachers"])
    # a subclass of a served class counts, a meta-architecture without any tap does not
    assert {"RetinaNet", "MimicDet", "SSD", "GeneralizedRCNN"} <= set(found["detectors"])
    assert "SemanticSegmentor" not in found["detectors"]
